"""The engine loop of a replica: chunks of prompts, running sequences, or both in a step; arrivals, leases, swaps.

    RunPrompts --> prompts --last chunk--+--stays--------------------> decode <--> swapped
                                         +--else--> leased             ^  |
    Join --> arrivals: wait for blocks, pull --copy completed----------+  +--last token--> blocks free
                                 CancelRequests, in every state: blocks free when the last step or copy has ended

It knows no role: what the router sends is what it does. A lease ends when its reader acknowledges a completed copy, or
the router cancels the request.

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
    AttachFailed,
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
    StepDone,
)
from ensemble.replicas.arrivals import Arrivals
from ensemble.replicas.followers import Followers
from ensemble.replicas.group_parts import GroupPuller, GroupSwapper
from ensemble.replicas.launched_steps import LaunchedSteps, Step
from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.peers import Peers
from ensemble.replicas.preemptive_decode import DecodePlan, PreemptiveDecodeScheduler
from ensemble.replicas.prompt_budget import prompt_budget
from ensemble.replicas.prompts import Prompts, PromptStep
from ensemble.replicas.reports import PrefixReports, SwapReports
from ensemble.request import Sequence
from ensemble.scheduling.decode_policies import make_decode_policy
from ensemble.scheduling.estimator import StepEstimator, TimedStep
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
        self.life = 0
        layout, pool = engine.pool.layout, engine.pool.tensor
        self.num_host_blocks = engine.group.smallest(settings.host_kv_bytes // layout.block_bytes)
        if settings.host_kv_bytes and not self.num_host_blocks:
            raise ConfigError(f"host_kv_bytes = {settings.host_kv_bytes}: a block has {layout.block_bytes} bytes")
        self.cache = PrefixCache(engine.blocks) if settings.prefix_cache else None
        self._device_blocks: BlockManager | PrefixCache = self.cache or engine.blocks
        self.blocks = SwappableBlocks(self._device_blocks, BlockManager(self.num_host_blocks, layout.block_size))
        self._prompts = Prompts(self._device_blocks, self._copy_blocks)
        self._settings = settings
        puller = puller or Puller(pool)
        swapper = swapper or Swapper(pool, make_host_pool(layout, self.num_host_blocks, pool.device))
        self._arrivals = Arrivals(
            self._device_blocks, peers, puller if followers is None else GroupPuller(puller, followers)
        )
        self.leases = Leases() if leases is None else leases
        self._swapper = swapper if followers is None else GroupSwapper(swapper, followers)
        self._scheduler = PreemptiveDecodeScheduler(
            self.blocks,
            make_decode_policy(settings.policy),
            max_num_seqs=settings.max_num_seqs,
            headroom_blocks=settings.headroom_blocks,
            may_give_up=settings.admission == "optimistic",
        )
        # Under fcfs an arrival comes after all that are here: none of them makes room for it.
        self._makes_room = settings.policy.fills_host_pool
        self._running: dict[int, Sequence] = {}  # request_id |-> decodes here and is not removed
        self._given_up: set[int] = set()  # request ids, to be told of when their launched step has run
        self._going: set[int] = set()  # the same, of those that go on elsewhere
        self.estimator = StepEstimator()
        self._launched = LaunchedSteps(engine, followers, clock)
        self._swap_reports = SwapReports(layout.block_bytes, self.num_host_blocks)
        self._prefix_reports = None if self.cache is None else PrefixReports(self.cache)

    @property
    def num_free_blocks(self) -> int:
        return self._device_blocks.num_free_blocks

    @property
    def has_work(self) -> bool:
        copies = self._arrivals.num_in_flight + self._swapper.num_in_flight
        return len(self._scheduler) > 0 or len(self._launched) > 0 or copies > 0 or self._prompts.has_work

    @property
    def waits_for_gpu(self) -> bool:
        """All there is to do is launched and has not run: should work come meanwhile, it need not wait for that."""
        if not self._launched or len(self._scheduler) > 0 or self._prompts.has_work:
            return False
        return not self._launched.next_is_done

    @property
    def launched_s(self) -> float:
        """What the launched steps are predicted to take at most, each at one place of a pipeline after the other."""
        return self._num_places * sum(map(self.estimator.seconds, self._launched.shapes))

    @property
    def _num_places(self) -> int:
        """Of the engine's pipeline."""
        return self.engine.max_num_unread + 1 if self.engine.is_pipeline else 1

    @property
    def is_empty(self) -> bool:
        """Whether no request has anything here."""
        return not (self.has_work or self.leases or self._running or self._arrivals.request_ids)

    def handle(self, command: Command) -> list[Event]:
        match command:
            case RunPrompts():
                self._prompts.add(command)
                return []
            case Join(arrivals=arrivals):
                events: list[Event] = []
                for arrival in arrivals:
                    if arrival.handoff.source == self.address:
                        events += self._adopt(arrival)
                    else:
                        self._arrivals.receive(arrival)
                events += self._give_up_unmappable({arrival.handoff.source for arrival in arrivals})
                self.start_pulls()
                return events
            case HandOff(request_ids=request_ids):
                return self._hand_off(request_ids)
            case LeasePrefix(lease_id=lease_id, hashes=hashes):
                return [PrefixLeased(handoff=self._lease_prefix(lease_id, hashes))]
            case PullPrefix(handoff=handoff, hashes=hashes):
                self._arrivals.receive_prefix(handoff, hashes)
                events = self._give_up_unmappable({handoff.source})
                self.start_pulls()
                return events
            case CancelRequests(request_ids=request_ids):
                events = self._cancel(request_ids)
                self.start_pulls()
                return events
            case AttachPeer(address=address):
                if address != self.address:
                    self.peers.attach(address)
                return []
            case DetachPeer(address=address):
                return self._detach(address)

    def receive_handles(self) -> list[Event]:
        """Maps the pools whose handles have come, and starts what waited for them."""
        events: list[Event] = []
        for address, reason in self.peers.receive_handles():
            if reason is not None:
                events.append(AttachFailed(address=address, reason=reason, request_ids=[]))
                events += self._give_up_unmappable({address})
        self.start_pulls()
        return events

    def end_leases(self, request_ids: list[int]) -> list[Event]:
        """Their readers have their copies; an unknown lease was ended by a cancel before."""
        ended = [request_id for request_id in request_ids if request_id in self.leases]
        for request_id in ended:
            self._end_lease(request_id)
        if ended:
            self.start_pulls()
        return self._released(ended)

    def cancel_all(self) -> list[Event]:
        """Ends every request. Call `step` until `is_empty`."""
        request_ids = [*self._prompts.request_ids, *self._running, *self._arrivals.request_ids, *self.leases]
        return self._cancel(request_ids)

    def begin_life(self, life: int) -> None:
        """Another one, in the same processes, without a request of the one before."""
        self.life = life
        if self._followers is not None:
            self._followers.begin_life(life)

    def step(self) -> list[Event]:
        """Lets arrived sequences join, launches a step, and commits the one before (on a CPU: this one).

        So the events that say who has joined leave with the tokens of the step before theirs.
        """
        start = self._clock()
        events = self._join()
        if events and not self.engine.runs_ahead:
            return events  # who has joined is told of before its first step, which may take long
        events += self._end_swaps()
        num_owed_blocks = self._arrivals.num_wanted_blocks  # to who came before
        prompts = self._prompts.next_step(
            self._prompt_budget(), lambda num_blocks: self._scheduler.has_room_for(num_blocks + num_owed_blocks)
        )
        plan = self._plan(start, prompts)
        self._start_swaps(plan)
        events += self._give_up(plan.give_up)
        step = None
        if prompts.rows or plan.run:
            step = self._launched.launch(Batch(prompts.rows, plan.run), prompts)
        elif prompts.batch_ids:  # all their prompts were cancelled
            events.append(self._step_done([], [], prompts.batch_ids))
        if self.engine.runs_ahead:
            self._decode_prompts(step, num_unread_tokens=1)
        max_num_unread = self.engine.max_num_unread
        if self._launched and (step is None or len(self._launched) > max_num_unread):
            events += self._commit_oldest()
        elif not self._launched and not events:
            self._wait_for_copy()
        now = self._clock()
        self._scheduler.ran(now - start, now, num_unread_tokens=int(max_num_unread > 0))
        self._prompts.ran(prompts, now - start)
        self._retire_those_at_their_end()
        self.start_pulls()
        return events + self._swap_report() + (self._prefix_reports.take() if self._prefix_reports is not None else [])

    def _commit_oldest(self) -> list[Event]:
        step, sampled, timed = self._launched.commit()
        self.estimator.observe(timed.shape, timed.seconds)
        events = self._commit(step, sampled, timed)
        if not self.engine.runs_ahead:
            self._decode_prompts(step, num_unread_tokens=0)
        return events

    def _copy_blocks(self, source_ids: list[int], target_ids: list[int]) -> None:
        if self._followers is not None:
            self._followers.copy_blocks(source_ids, target_ids)
        self.engine.pool.copy_blocks(source_ids, target_ids)

    def start_pulls(self) -> None:
        """Starts the copies of arrivals for which there are blocks now."""
        self._arrivals.start_pulls(self._scheduler.has_room_for)

    def _prompt_budget(self) -> int:
        return prompt_budget(
            self._settings,
            self.estimator,
            self._prompts,
            self._launched.mean_context_len,
            min(len(self._scheduler), self._settings.max_num_seqs),
            (each.request.itl_target_s for each in self._running.values()),
            self._num_places,
            fills_tiles=self.engine.runs_ahead,
        )

    def _plan(self, now: float, prompts: PromptStep) -> DecodePlan:
        if prompts.rows and self._settings.batching == "prefill-first":
            return DecodePlan()
        num_wanted_blocks = self._arrivals.num_wanted_blocks + self._prompts.num_wanted_blocks
        num_wanted_blocks = num_wanted_blocks if self._makes_room else 0
        if self.engine.is_pipeline:
            return self._scheduler.next_part(now, num_wanted_blocks, self._launched.request_ids, self._num_places)
        return self._scheduler.next_plan(now, num_wanted_blocks)

    def _decode_prompts(self, step: Step | None, num_unread_tokens: int) -> None:
        """Prompts that stay and that a step finishes decode from the next one on, unless it ends them."""
        for sequence in step.finished_prompts if step is not None else []:
            ends = sequence.is_finished or sequence.num_left_tokens <= num_unread_tokens
            if not ends and self._prompts.stays(sequence.request_id):
                self._add(self._prompts.take(sequence.request_id), num_unread_tokens, self._prompts_cost_s(sequence))

    def _prompts_cost_s(self, sequence: Sequence) -> float:
        return self._prompts.cost_s(sequence.request.prefill_len)

    def _add(self, sequence: Sequence, num_unread_tokens: int, join_cost_s: float) -> None:
        self._running[sequence.request_id] = sequence
        self._scheduler.add(
            sequence,
            self._clock(),
            priority=sequence.request.priority,
            join_cost_s=join_cost_s,
            num_unread_tokens=num_unread_tokens,
        )

    def _adopt(self, arrival: Arrival) -> list[Event]:
        """What was leased goes on here, in the blocks where it is."""
        request_id = arrival.request.request_id
        if request_id not in self.leases:
            return []  # cancelled
        self.leases.end(request_id)
        owner = Owner("sequence", request_id)
        self._device_blocks.reassign(Owner("transfer", request_id), owner)
        block_ids = list(self._device_blocks.blocks_of(owner))
        sequence = Sequence(arrival.request, list(arrival.output_token_ids), arrival.handoff.num_kv_tokens, block_ids)
        self._add(sequence, 0, self._prompts_cost_s(sequence))
        return [Joined(request_ids=[request_id], transfer_s=[0.0], transfer_bytes=[0])]

    def _join(self) -> list[Event]:
        ended = self._arrivals.ended()
        for sequence, pull in ended.arrived:
            if self.cache is not None:
                self.cache.commit(Owner("sequence", sequence.request_id), sequence.num_computed_tokens)
            self._add(sequence, 0, pull.seconds + self._swapper.swap_in_s(len(pull.target_block_ids)))
        events: list[Event] = []
        if ended.arrived:
            pulls = [pull for _, pull in ended.arrived]
            events.append(
                Joined(
                    request_ids=[pull.request_id for pull in pulls],
                    transfer_s=[pull.seconds for pull in pulls],
                    transfer_bytes=[pull.num_bytes for pull in pulls],
                    waited_s=[pull.waited_s for pull in pulls],
                    transports=[pull.source.transport for pull in pulls],
                )
            )
        events += ended.prefixes
        events += self._released([*ended.cancelled, *ended.failed])
        if ended.failed:
            events.append(PullsFailed(reasons=ended.failed))
        for source, reason in ended.broken:
            if not self.peers.renew(source, reason):
                events.append(AttachFailed(address=source.address, reason=reason, request_ids=[]))
                events += self._give_up_unmappable({source.address})
        return events

    def _start_swaps(self, plan: DecodePlan) -> None:
        """Before the planned batch is launched, so that a copy out waits for the steps that wrote its blocks alone."""
        for swap in plan.swap_out:
            self._swapper.start(swap, "out")
        for swap in plan.swap_in:
            self._swapper.start(swap, "in")
        self._swap_reports.num_preemptions += len(plan.swap_out)

    def _give_up(self, sequences: list[Sequence]) -> list[Event]:
        """Their blocks are for others; the router has them computed again, from the tokens that were told."""
        self._given_up.update(each.request_id for each in sequences)
        return self._preempted([each.request_id for each in sequences if self._leave(each.request_id)])

    def _preempted(self, request_ids: list[int]) -> list[Event]:
        if not request_ids:
            return []
        self._given_up.difference_update(request_ids)
        return [Preempted(request_ids=request_ids, num_free_blocks=self.num_free_blocks)]

    def _end_swaps(self) -> list[Event]:
        released = []
        for swapped in self._swapper.completed():
            self._swap_reports.add(swapped)
            if self._scheduler.swap_ended(swapped.request_id):
                released.append(swapped.request_id)
        return self._released(released)

    def _wait_for_copy(self) -> None:
        if self._swapper.num_in_flight:
            self._swapper.wait(1e-3)
        else:
            self._arrivals.wait(1e-3)

    def _commit(self, step: Step, sampled: list[Sequence], timed: TimedStep) -> list[Event]:
        if self.cache is not None:
            for row in step.launched.batch.prefills:
                if (owner := Owner("sequence", row.sequence.request_id)) in self.cache:
                    self.cache.commit(owner, row.end)
        ended = [sequence.request_id for sequence in step.sequences if sequence.is_finished]
        released = self._released([request_id for request_id in ended if self._leave(request_id)])
        self._given_up.difference_update(ended)  # with that step's tokens, or by a cancel
        self._going.difference_update(ended)
        given_up = [each.request_id for each in step.sequences if each.request_id in self._given_up]
        preempted = self._preempted([request_id for request_id in given_up if self._leave(request_id)])
        handoffs = [self._lease(each) for each in step.finished_prompts if self._goes_on_elsewhere(each)]
        done = self._step_done(sampled, handoffs, step.prompts.batch_ids, timed)
        going = [each.request_id for each in step.sequences if each.request_id in self._going]
        return [done, *released, *preempted, *self._handed_off(going, [])]

    def _goes_on_elsewhere(self, sequence: Sequence) -> bool:
        request_id = sequence.request_id
        return not sequence.is_finished and request_id in self._prompts and not self._prompts.stays(request_id)

    def _hand_off(self, request_ids: list[int]) -> list[Event]:
        """Running sequences go on elsewhere, at once or when their launched steps have run."""
        running = [each for each in request_ids if each in self._running and not self._running[each].is_finished]
        going = [each for each in running if self._scheduler.may_leave(each)]
        self._going.update(going)
        for request_id in self._launched.request_ids.intersection(going):
            self._scheduler.retire(request_id)
        coming = [each for each in request_ids if each in self._arrivals or each in self._prompts]
        stay = coming + [each for each in running if each not in going and each in self._scheduler]
        return self._handed_off(going, stay)

    def _handed_off(self, request_ids: list[int], stay: list[int]) -> list[Event]:
        """Of these, those that no launched step uses any more."""
        handoffs = []
        for request_id in request_ids:
            if request_id in self._launched.request_ids:
                continue
            self._going.discard(request_id)
            self._scheduler.take(request_id)
            sequence = self._running.pop(request_id)
            self._keep(sequence)
            handoffs.append(self._offer(sequence))
        return [HandedOff(handoffs=handoffs, stay=stay)] if handoffs or stay else []

    def _lease(self, sequence: Sequence) -> KVHandoff:
        """Of a finished prompt."""
        self._prompts.take(sequence.request_id)
        return self._offer(sequence)

    def _offer(self, sequence: Sequence) -> KVHandoff:
        """From here on the blocks are the reader's to release."""
        request_id = sequence.request_id
        self._device_blocks.reassign(Owner("sequence", request_id), Owner("transfer", request_id))
        self._runs_no_more(request_id)
        self.leases.grant(request_id, sequence.block_ids)
        return KVHandoff(
            request_id=request_id,
            source=self.address,
            life=self.life,
            num_kv_tokens=sequence.num_computed_tokens,
            block_ids=sequence.block_ids,
        )

    def _lease_prefix(self, lease_id: int, hashes: list[bytes]) -> KVHandoff:
        block_ids = [] if self.cache is None else self.cache.lease(Owner("transfer", lease_id), hashes)
        if block_ids:
            self.leases.grant(lease_id, block_ids)
        return KVHandoff(
            request_id=lease_id,
            source=self.address,
            life=self.life,
            num_kv_tokens=len(block_ids) * self._device_blocks.block_size,
            block_ids=block_ids,
        )

    def _end_lease(self, request_id: int) -> None:
        self.leases.end(request_id)
        self._device_blocks.free(Owner("transfer", request_id))

    def _step_done(
        self,
        sampled: list[Sequence],
        handoffs: list[KVHandoff],
        batch_ids: list[int],
        timed: TimedStep | None = None,
    ) -> StepDone:
        return StepDone(
            request_ids=[sequence.request_id for sequence in sampled],
            positions=[len(sequence.output_token_ids) - 1 for sequence in sampled],
            token_ids=[sequence.last_token_id for sequence in sampled],
            finished={each.request_id: each.finish_reason for each in sampled if each.finish_reason is not None},
            log_probs={each.request_id: each.last_log_probs for each in sampled if each.last_log_probs is not None},
            handoffs=handoffs,
            batch_ids=batch_ids,
            num_free_blocks=self.num_free_blocks,
            timed=timed,
        )

    def _retire_those_at_their_end(self) -> None:
        """Sequences whose unread token is the last that they may have run no further."""
        for request_id in self._launched.request_ids:
            sequence = self._running.get(request_id)  # None: a prompt that is not finished, or does not decode here
            if sequence is None or request_id not in self._scheduler:
                continue
            if sequence.num_left_tokens <= 1:
                self._scheduler.retire(request_id)

    def _cancel(self, request_ids: list[int]) -> list[Event]:
        released = []
        for request_id in request_ids:
            if request_id in self._prompts:
                if self._prompts.cancel(request_id) or self._leave(request_id):
                    released.append(request_id)
            elif request_id in self._running:
                self._running[request_id].finish_reason = "cancelled"
                if self._leave(request_id):
                    released.append(request_id)
            elif request_id in self.leases:
                self._end_lease(request_id)
                released.append(request_id)
            elif request_id in self._arrivals and self._arrivals.cancel(request_id):
                released.append(request_id)
        return self._released(released) + self._swap_report()

    def _give_up_unmappable(self, addresses: set[str]) -> list[Event]:
        """What was to come from pools that cannot be mapped is given up."""
        events: list[Event] = []
        for address in addresses:
            reason = self.peers.why_unmappable(address)
            request_ids = self._arrivals.from_source(address) if reason is not None else []
            if reason is not None and request_ids:
                self._cancel(request_ids)
                events.append(AttachFailed(address=address, reason=reason, request_ids=request_ids))
        return events

    def _detach(self, address: str) -> list[Event]:
        """Gives up what has not arrived from a dead source, lets its copies end, and closes the mapping."""
        lost = self._arrivals.from_source(address)
        events = self._cancel(lost)
        self.peers.end_links(address)
        while any(request_id in self._arrivals for request_id in lost):
            self._arrivals.wait(1e-3)
            events += self._join()
        self.peers.detach(address)
        self.start_pulls()
        return [*events, Detached(address=address)]

    def _leave(self, request_id: int) -> bool:
        """Ends a sequence; True if its blocks are free now, not only after the launched step or a copy."""
        if request_id in self._launched.request_ids:
            if request_id in self._scheduler:
                self._scheduler.retire(request_id)
            return False
        self._runs_no_more(request_id)
        if request_id in self._prompts:
            self._prompts.take(request_id)
            self._device_blocks.free(Owner("sequence", request_id))
            return True
        self._keep(self._running.pop(request_id))
        return self._scheduler.remove(request_id)

    def _runs_no_more(self, request_id: int) -> None:
        if self._followers is not None:
            self._followers.forget(request_id)

    def _keep(self, sequence: Sequence) -> None:
        """Its blocks can be shared when they are free: the next turn of a conversation begins with them."""
        owner = Owner("sequence", sequence.request_id)
        if self.cache is not None and self.blocks.place_of(owner) == "device":
            num_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
            self.cache.store(owner, sequence.token_ids(0, num_tokens))

    def _released(self, request_ids: list[int]) -> list[Event]:
        if not request_ids:
            return []
        return [Released(request_ids=request_ids, num_free_blocks=self.num_free_blocks)]

    def _swap_report(self) -> list[Event]:
        return self._swap_reports.take(self._scheduler.num_swapped_seqs, self.blocks.host.num_free_blocks)
