"""The engine loop of a replica: chunks of prompts, running sequences, or both in a step; arrivals, leases, swaps.

    RunPrompts --> prompts --last chunk--+--stays--------------------> decode <--> swapped
                                         +--else--> leased             ^  |
    Join --> arrivals: wait for blocks, pull --copy completed----------+  +--last token--> blocks free
                                 CancelRequests, in every state: blocks free when the last step or copy has ended

arrivals   sequences and prefixes whose KV is pulled from other replicas
prompts    what is to be computed, and is not finished
running    sequences that decode, here or in the host pool by turns
lending    KV that others may read: until they acknowledge a completed copy, or the router cancels the request
launched   the steps that are in flight

It knows no role: what the router sends is what it does.

On a GPU a step is launched before the tokens of the one before are read. A sequence that those tokens end has then run
a step too many: its last token is dropped, and its blocks are freed only when that step has run.

In a pipeline as many steps are in flight as it has places. A sequence decodes in one of them, so that the batch is
split; the chunks of a prompt may be in all.
"""

import time
from collections.abc import Callable

from ensemble.cache.block_manager import BlockManager, Owner, SwappableBlocks
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.cache.swapper import Swapper, make_host_pool
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine
from ensemble.errors import ConfigError
from ensemble.protocol.router_replica import (
    Arrival,
    AttachPeer,
    CancelRequests,
    Command,
    Detached,
    DetachPeer,
    Event,
    HandedOff,
    HandOff,
    Join,
    Joined,
    KVHandoff,
    LeasePrefix,
    Preempted,
    PrefixLeased,
    PullPrefix,
    PullsFailed,
    Released,
    RunPrompts,
)
from ensemble.replicas.arrivals import Arrivals
from ensemble.replicas.followers import Followers
from ensemble.replicas.launched_steps import LaunchedSteps, Step
from ensemble.replicas.lending import Lending
from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.peers import Peers
from ensemble.replicas.preemptive_decode import DecodePlan
from ensemble.replicas.prompt_budget import prompt_budget
from ensemble.replicas.prompts import Prompts, PromptStep
from ensemble.replicas.reports import PrefixReports, joined, step_done
from ensemble.replicas.running import RunningSequences
from ensemble.request import Sequence
from ensemble.scheduling.estimator import StepEstimator
from ensemble.transfer.leases import Leases
from ensemble.transfer.puller import Puller


class EngineLoop:
    """`address` is where others read its pool, `life` which one this is. Raises ConfigError without a host pool.

    It runs in the first rank of a replica; the others, `followers`, are told what it does to the pool. `puller`,
    `swapper` and `clock` are others where time is simulated.
    """

    def __init__(
        self,
        engine: Engine,
        peers: Peers,
        settings: LoopSettings,
        address: str,
        followers: Followers | None = None,
        *,
        life: int = 0,
        leases: Leases | None = None,  # its own, where others look at them
        puller: Puller | None = None,
        swapper: Swapper | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._followers = followers
        self._clock = clock
        self.peers = peers
        self.address = address
        layout, pool = engine.pool.layout, engine.pool.tensor
        self.num_host_blocks = engine.group.smallest(settings.host_kv_bytes // layout.block_bytes)
        if settings.host_kv_bytes and not self.num_host_blocks:
            raise ConfigError(f"host_kv_bytes = {settings.host_kv_bytes}: a block has {layout.block_bytes} bytes")
        self.cache = PrefixCache(engine.blocks) if settings.prefix_cache else None
        self._device_blocks: BlockManager | PrefixCache = self.cache or engine.blocks
        self.blocks = SwappableBlocks(self._device_blocks, BlockManager(self.num_host_blocks, layout.block_size))
        self.leases = Leases() if leases is None else leases
        self._lending = Lending(self._device_blocks, self.leases, address, life)
        self._settings = settings
        start_pull, start_swap = (None, None) if followers is None else (followers.start_pull, followers.start_swap)
        puller = puller or Puller(pool, engine.block_bytes, start_pull)
        self._swapper = swapper or Swapper(pool, make_host_pool(layout, self.num_host_blocks, pool.device), start_swap)
        self._arrivals = Arrivals(self._device_blocks, peers, puller)
        self._launched = LaunchedSteps(engine, followers, clock)
        self._prompts = Prompts(self._device_blocks, self._launched, self._lending, self._copy_blocks)
        self._running = RunningSequences(
            self.blocks, settings, self._launched, self._lending, self._swapper, engine.block_bytes
        )
        self.estimator = StepEstimator()
        self._prefix_reports = None if self.cache is None else PrefixReports(self.cache)

    @property
    def num_free_blocks(self) -> int:
        return self._device_blocks.num_free_blocks

    @property
    def has_work(self) -> bool:
        copies = self._arrivals.num_in_flight + self._swapper.num_in_flight
        return self._running.num_going_on > 0 or len(self._launched) > 0 or copies > 0 or self._prompts.has_work

    @property
    def waits_for_gpu(self) -> bool:
        """All there is to do is launched and has not run: should work come meanwhile, it need not wait for that."""
        if not self._launched or self._running.num_going_on > 0 or self._prompts.has_work:
            return False
        return not self._launched.next_is_done

    @property
    def launched_s(self) -> float:
        """What the launched steps are predicted to take at most, each at one place of a pipeline after the other."""
        return self._launched.num_places * sum(map(self.estimator.seconds, self._launched.shapes))

    @property
    def is_empty(self) -> bool:
        """Whether no request has anything here."""
        return not (self.has_work or self.leases or self._running.request_ids or self._arrivals.request_ids)

    # ---- what comes in

    def handle(self, command: Command) -> list[Event]:
        match command:
            case RunPrompts():
                self._prompts.add(command)
                return []
            case Join(arrivals=arrivals):
                events: list[Event] = []
                for arrival in arrivals:
                    if arrival.handoff.source == self.address:
                        events += self._take_back(arrival)
                    else:
                        self._arrivals.receive(arrival)
                events += self._arrivals.give_up_unmappable({arrival.handoff.source for arrival in arrivals})
                self._start_pulls()
                return events
            case HandOff(request_ids=request_ids):
                coming = [each for each in request_ids if each in self._arrivals or each in self._prompts]
                handoffs, staying = self._running.hand_off(request_ids)
                return self._handed_off(handoffs, coming + staying)
            case LeasePrefix(lease_id=lease_id, hashes=hashes):
                return [PrefixLeased(handoff=self._lending.offer_prefix(lease_id, hashes))]
            case PullPrefix(handoff=handoff, hashes=hashes):
                self._arrivals.receive_prefix(handoff, hashes)
                failed = self._arrivals.give_up_unmappable([handoff.source])
                self._start_pulls()
                return [*failed]
            case CancelRequests(request_ids=request_ids):
                events = self._cancel(request_ids)
                self._start_pulls()
                return events
            case AttachPeer(address=address):
                if address != self.address:
                    self.peers.attach(address)
                return []
            case DetachPeer(address=address):
                return self._detach(address)

    def receive_handles(self) -> list[Event]:
        """Maps the pools whose handles have come, and starts what waited for them."""
        failed = self._arrivals.receive_handles()
        self._start_pulls()
        return [*failed]

    def end_leases(self, request_ids: list[int]) -> list[Event]:
        """Their readers have their copies; an unknown lease was ended by a cancel before."""
        ended = [request_id for request_id in request_ids if request_id in self.leases]
        for request_id in ended:
            self._lending.end(request_id)
        if ended:
            self._start_pulls()
        return self._released(ended)

    def cancel_all(self) -> list[Event]:
        """Ends every request. Call `step` until `is_empty`."""
        return self._cancel(
            [*self._prompts.request_ids, *self._running.request_ids, *self._arrivals.request_ids, *self.leases]
        )

    def begin_life(self, life: int) -> None:
        """Another one, in the same processes, without a request of the one before."""
        self._lending.life = life
        if self._followers is not None:
            self._followers.begin_life(life)

    def _take_back(self, arrival: Arrival) -> list[Event]:
        """What was lent goes on here, in the blocks where it is."""
        request_id = arrival.request.request_id
        if request_id not in self.leases:
            return []  # cancelled
        block_ids = self._lending.take_back(request_id)
        sequence = Sequence(arrival.request, list(arrival.output_token_ids), arrival.handoff.num_kv_tokens, block_ids)
        self._running.add(sequence, self._clock(), self._prompts_cost_s(sequence))
        return [Joined(request_ids=[request_id], transfer_s=[0.0], transfer_bytes=[0])]

    def _cancel(self, request_ids: list[int]) -> list[Event]:
        released = []
        for request_id in request_ids:
            has_left = False
            if request_id in self._prompts:
                has_left = self._prompts.cancel(request_id)
            elif request_id in self._running:
                has_left = self._running.cancel(request_id)
            elif request_id in self.leases:
                self._lending.end(request_id)
                has_left = True
            elif request_id in self._arrivals:
                has_left = self._arrivals.cancel(request_id)
            if has_left:
                released.append(request_id)
        return self._released(released) + self._running.swap_report()

    def _detach(self, address: str) -> list[Event]:
        """Gives up what has not arrived from a dead source, lets its copies end, and closes the mapping."""
        lost = self._arrivals.from_source(address)
        events = self._cancel(lost)
        self.peers.end_links(address)
        while any(request_id in self._arrivals for request_id in lost):
            self._arrivals.wait(1e-3)
            events += self._join()
        self.peers.detach(address)
        self._start_pulls()
        return [*events, Detached(address=address)]

    def _start_pulls(self) -> None:
        """Starts the copies of arrivals for which there are blocks now."""
        self._arrivals.start_pulls(self._running.has_room_for)

    # ---- a step

    def step(self) -> list[Event]:
        """Lets arrived sequences join, launches a step, and commits the one before (on a CPU: this one).

        So the events that say who has joined leave with the tokens of the step before theirs.
        """
        start = self._clock()
        events = self._join()
        if events and not self.engine.runs_ahead:
            return events  # who has joined is told of before its first step, which may take long
        events += self._released(self._running.end_swaps())
        num_owed_blocks = self._arrivals.num_wanted_blocks  # to who came before
        prompts = self._prompts.next_step(
            self._prompt_budget(), lambda num_blocks: self._running.has_room_for(num_blocks + num_owed_blocks)
        )
        plan = self._plan(start, prompts)
        events += self._preempted(self._running.give_up(plan.give_up))
        step = None
        if prompts.rows or plan.run:
            step = self._launched.launch(Batch(prompts.rows, plan.run), prompts.batch_ids)
        elif prompts.batch_ids:  # all their prompts were cancelled
            events.append(step_done([], [], prompts.batch_ids, self.num_free_blocks))
        if self.engine.runs_ahead:
            self._decode_prompts(step, num_unread_tokens=1)
        max_num_unread = self.engine.max_num_unread
        if self._launched and (step is None or len(self._launched) > max_num_unread):
            events += self._commit_oldest()
        elif not self._launched and not events:
            self._wait_for_copy()
        now = self._clock()
        self._running.ran(now - start, now, num_unread_tokens=int(max_num_unread > 0))
        self._prompts.ran(prompts, now - start)
        self._start_pulls()
        events += self._running.swap_report()
        return events + (self._prefix_reports.take() if self._prefix_reports is not None else [])

    def _join(self) -> list[Event]:
        """What has come of the copies of arrivals."""
        ended = self._arrivals.ended()
        for sequence, pull in ended.arrived:
            if self.cache is not None:
                self.cache.commit(Owner("sequence", sequence.request_id), sequence.num_computed_tokens)
            join_cost_s = pull.seconds + self._swapper.swap_in_s(len(pull.target_block_ids))
            self._running.add(sequence, self._clock(), join_cost_s)
        events: list[Event] = [joined([pull for _, pull in ended.arrived])] if ended.arrived else []
        events += ended.prefixes
        events += self._released([*ended.cancelled, *ended.failed])
        if ended.failed:
            events.append(PullsFailed(reasons=ended.failed))
        return events + ended.unreadable

    def _prompt_budget(self) -> int:
        return prompt_budget(
            self._settings,
            self.estimator,
            self._prompts,
            self._launched.mean_context_len,
            min(self._running.num_going_on, self._settings.max_num_seqs),
            self._running.requests,
            self._launched.last_s,
            self._launched.num_places,
            fills_tiles=self.engine.runs_ahead,
        )

    def _plan(self, now: float, prompts: PromptStep) -> DecodePlan:
        if prompts.rows and self._settings.batching == "prefill-first":
            return DecodePlan()
        return self._running.next_plan(now, self._arrivals.num_wanted_blocks + self._prompts.num_wanted_blocks)

    def _decode_prompts(self, step: Step | None, num_unread_tokens: int) -> None:
        """Prompts that stay and that a step finishes decode from the next one on, unless it ends them."""
        for sequence in step.finished_prompts if step is not None else []:
            ends = sequence.is_finished or sequence.num_left_tokens <= num_unread_tokens
            if not ends and self._prompts.stays(sequence.request_id):
                self._prompts.take(sequence.request_id)
                self._running.add(sequence, self._clock(), self._prompts_cost_s(sequence), num_unread_tokens)

    def _prompts_cost_s(self, sequence: Sequence) -> float:
        return self._prompts.cost_s(sequence.request.prefill_len)

    def _copy_blocks(self, source_ids: list[int], target_ids: list[int]) -> None:
        if self._followers is not None:
            self._followers.copy_blocks(source_ids, target_ids)
        self.engine.pool.copy_blocks(source_ids, target_ids)

    def _commit_oldest(self) -> list[Event]:
        step, sampled, timed = self._launched.commit()
        self.estimator.observe(timed.shape, timed.seconds)
        self._prompts.share(step)
        ended = [sequence.request_id for sequence in step.sequences if sequence.is_finished]
        released = self._released([request_id for request_id in ended if self._leave(request_id)])
        preempted = self._preempted(self._running.given_up_after(step))
        done = step_done(sampled, self._prompts.lend(step), step.batch_ids, self.num_free_blocks, timed)
        handed_off = self._handed_off(self._running.handed_off_after(step))
        if not self.engine.runs_ahead:
            self._decode_prompts(step, num_unread_tokens=0)
        return [done, *released, *preempted, *handed_off]

    def _leave(self, request_id: int) -> bool:
        """Ends a prompt or a sequence; True if its blocks are free now, not only after launched steps or a copy."""
        return (self._prompts if request_id in self._prompts else self._running).leave(request_id)

    def _wait_for_copy(self) -> None:
        if self._swapper.num_in_flight:
            self._swapper.wait(1e-3)
        else:
            self._arrivals.wait(1e-3)

    # ---- what goes out

    def _released(self, request_ids: list[int]) -> list[Event]:
        if not request_ids:
            return []
        return [Released(request_ids=request_ids, num_free_blocks=self.num_free_blocks)]

    def _preempted(self, request_ids: list[int]) -> list[Event]:
        """Their blocks are for others; the router has them computed again, from the tokens that were told."""
        if not request_ids:
            return []
        return [Preempted(request_ids=request_ids, num_free_blocks=self.num_free_blocks)]

    @staticmethod
    def _handed_off(handoffs: list[KVHandoff], stay: list[int] | None = None) -> list[Event]:
        return [HandedOff(handoffs=handoffs, stay=stay or [])] if handoffs or stay else []
