"""The decode worker: pulls handed-off KV as blocks come free, then decodes under a policy, swapping where it says so.

On a GPU each step is launched before the tokens of the one before are read. A sequence that those tokens end has then
run a step too many: its last token is dropped, and its blocks are freed only when that step has run.

SubmitDecode --> waits for blocks --> pull --copy completed: TransferDone to the source--> decode <--> swapped
                      |                |                                                     |            |
                      +---- CancelRequests or the last token: when its copy or step has ended, blocks are free

It may also compute prompts itself (`local_prefill.py`), which then decode here: in the same steps, or in others.
"""

import time
from dataclasses import dataclass

from ensemble.cache.block_manager import BlockManager, Owner, SwappableBlocks
from ensemble.cache.swapper import Swapper, make_host_pool
from ensemble.config import DecodeConfig
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, Launched
from ensemble.errors import ConfigError
from ensemble.request import FinishReason, Sequence
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy
from ensemble.scheduling.preemptive_decode import DecodePlan, PreemptiveDecodeScheduler
from ensemble.transfer.puller import Puller
from ensemble.workers.arrivals import Arrivals
from ensemble.workers.local_prefill import LocalPrefill, LocalStep
from ensemble.workers.messages import (
    AttachPeer,
    CancelRequests,
    Command,
    Detached,
    DetachPeer,
    Joined,
    LocalPrefilled,
    PrefillBatch,
    PrefillResult,
    Released,
    StepTokens,
    SubmitDecode,
    SwapReport,
    WorkerEvent,
)
from ensemble.workers.peers import Peers


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """A step whose tokens have not been read."""

    launched: Launched
    prompts: LocalStep

    @property
    def sequences(self) -> list[Sequence]:
        batch = self.launched.batch
        return [row.sequence for row in batch.prefills] + batch.decodes

    @property
    def finished_prompts(self) -> list[Sequence]:
        return [row.sequence for row in self.launched.batch.prefills if row.finishes_prompt]


class DecodeWorker:
    """Raises ConfigError if the host pool cannot be had."""

    def __init__(self, engine: Engine, peers: Peers, config: DecodeConfig, local_prefill_tokens: int = 0) -> None:
        """`local_prefill_tokens` of prompts, at most, are computed in a step."""
        self.engine = engine
        self.peers = peers
        layout, pool = engine.pool.layout, engine.pool.tensor
        self.num_host_blocks = config.host_kv_bytes // layout.block_bytes
        if config.host_kv_bytes and not self.num_host_blocks:
            raise ConfigError(f"host_kv_bytes = {config.host_kv_bytes}: a block has {layout.block_bytes} bytes")
        self.blocks = SwappableBlocks(engine.blocks, BlockManager(self.num_host_blocks, layout.block_size))
        self._arrivals = Arrivals(engine.blocks, peers, Puller(pool))
        self._swapper = Swapper(pool, make_host_pool(layout, self.num_host_blocks, pool.device))
        settings = DecodePolicySettings(config.policy, config.quantum_s, config.starvation_s)
        self._scheduler = PreemptiveDecodeScheduler(
            self.blocks,
            make_decode_policy(settings),
            max_num_seqs=config.max_num_seqs,
            headroom_blocks=config.headroom_blocks,
        )
        self._prompts = LocalPrefill(engine.blocks, local_prefill_tokens)
        self._is_prefill_first = config.batching == "prefill-first"
        # Under fcfs an arrival comes after all that are here: none of them makes room for it.
        self._makes_room = config.policy != "fcfs"
        self._running: dict[int, Sequence] = {}  # request_id |-> has joined and is not removed
        self._launched: _LaunchedStep | None = None
        self._launched_ids: set[int] = set()  # its request ids
        self._reported = SwapReport(num_swapped_seqs=0, num_preemptions=0, bytes_out=0, bytes_in=0)  # all in all
        self._num_preemptions = 0
        self._swap_bytes = {"out": 0, "in": 0}

    @property
    def has_work(self) -> bool:
        copies = self._arrivals.num_in_flight + self._swapper.num_in_flight
        return len(self._scheduler) > 0 or self._launched is not None or copies > 0 or self._prompts.has_work

    def handle(self, command: Command) -> list[WorkerEvent]:
        match command:
            case SubmitDecode(handoffs=handoffs):
                for handoff in handoffs:
                    self._arrivals.receive(handoff)
                self.start_pulls()
                return []
            case CancelRequests(request_ids=request_ids):
                events = self._cancel(request_ids)
                self.start_pulls()
                return events
            case AttachPeer(address=address):
                self.peers.attach(address)
                return []
            case DetachPeer(address=address):
                return self._detach(address)
            case PrefillBatch():
                self._prompts.add(command)
                return []

    def step(self) -> list[WorkerEvent]:
        """Lets arrived sequences join, launches an iteration, and commits the one before (on a CPU: this one)."""
        start = time.monotonic()
        events = self._join() + self._end_swaps()
        num_owed_blocks = self._arrivals.num_wanted_blocks  # to who came before
        prompts = self._prompts.next_step(lambda num_blocks: self._scheduler.has_room_for(num_blocks + num_owed_blocks))
        plan = self._plan(start, prompts)
        self._start_swaps(plan)
        step = None
        if prompts.rows or plan.run:
            step = _LaunchedStep(self.engine.launch(Batch(prompts.rows, plan.run)), prompts)
        elif prompts.batch_ids:  # all their prompts were cancelled
            num_free_blocks = self.engine.blocks.num_free_blocks
            events.append(LocalPrefilled(batch_ids=prompts.batch_ids, results=[], num_free_blocks=num_free_blocks))
        if self.engine.runs_ahead:
            step, self._launched = self._launched, step
            self._launched_ids = {each.request_id for each in self._launched.sequences} if self._launched else set()
            self._decode_prompts(self._launched, num_unread_tokens=1)
        if step is not None:
            events += self._commit(step)
        elif self._launched is None and not events:
            self._wait_for_copy()
        if not self.engine.runs_ahead:
            self._decode_prompts(step, num_unread_tokens=0)
        now = time.monotonic()
        self._scheduler.ran(now - start, now, num_unread_tokens=int(self.engine.runs_ahead))
        self._prompts.ran(prompts, now - start)
        self._retire_those_at_their_end()
        self.start_pulls()
        return events + self._swap_report()

    def _plan(self, now: float, prompts: LocalStep) -> DecodePlan:
        if prompts.rows and self._is_prefill_first:
            return DecodePlan()
        num_wanted_blocks = self._arrivals.num_wanted_blocks + self._prompts.num_wanted_blocks
        return self._scheduler.next_plan(now, num_wanted_blocks if self._makes_room else 0)

    def _decode_prompts(self, step: _LaunchedStep | None, num_unread_tokens: int) -> None:
        """Prompts that a step finishes decode from the next one on, unless their first token is their only one."""
        for sequence in step.finished_prompts if step is not None else []:
            if not sequence.is_finished and sequence.sampling.max_tokens > 1:
                self._running[sequence.request_id] = self._prompts.take(sequence.request_id)
                self._scheduler.add(
                    sequence,
                    time.monotonic(),
                    priority=sequence.request.priority,
                    join_cost_s=self._prompts.cost_s(sequence.prompt_len),
                    num_unread_tokens=num_unread_tokens,
                )

    def start_pulls(self) -> None:
        """Starts the copies of arrivals for which there are blocks now."""
        self._arrivals.start_pulls(self._scheduler.has_room_for)

    def _join(self) -> list[WorkerEvent]:
        arrived, released = self._arrivals.completed()
        for sequence, pull in arrived:
            self._running[sequence.request_id] = sequence
            self._scheduler.add(
                sequence,
                time.monotonic(),
                priority=sequence.request.priority,
                join_cost_s=pull.seconds + self._swapper.swap_in_s(len(pull.target_block_ids)),
            )
        events: list[WorkerEvent] = []
        if arrived:
            pulls = [pull for _, pull in arrived]
            events.append(
                Joined(
                    request_ids=[pull.request_id for pull in pulls],
                    transfer_s=[pull.seconds for pull in pulls],
                    transfer_bytes=[pull.num_bytes for pull in pulls],
                )
            )
        return events + self._released(released)

    def _start_swaps(self, plan: DecodePlan) -> None:
        """Before the planned batch is launched, so that a copy out waits for the steps that wrote its blocks alone."""
        for swap in plan.swap_out:
            self._swapper.start(swap, "out")
        for swap in plan.swap_in:
            self._swapper.start(swap, "in")
        self._num_preemptions += len(plan.swap_out)

    def _end_swaps(self) -> list[WorkerEvent]:
        released = []
        for swapped in self._swapper.completed():
            self._swap_bytes[swapped.way] += swapped.num_blocks * self.engine.pool.layout.block_bytes
            if self._scheduler.swap_ended(swapped.request_id):
                released.append(swapped.request_id)
        return self._released(released)

    def _wait_for_copy(self) -> None:
        if self._swapper.num_in_flight:
            self._swapper.wait(1e-3)
        else:
            self._arrivals.wait(1e-3)

    def _commit(self, step: _LaunchedStep) -> list[WorkerEvent]:
        sampled = self.engine.commit(step.launched)
        ended = [sequence.request_id for sequence in step.sequences if sequence.is_finished]
        prompts = {sequence.request_id for sequence in step.finished_prompts}
        decoded = [sequence for sequence in sampled if sequence.request_id not in prompts]
        released = self._released([request_id for request_id in ended if self._leave(request_id)])
        num_free_blocks = self.engine.blocks.num_free_blocks
        events: list[WorkerEvent] = []
        if step.prompts.batch_ids or prompts:
            results = [
                PrefillResult(
                    request_id=sequence.request_id,
                    token_id=sequence.last_token_id,
                    finish_reason=sequence.finish_reason,
                    handoff=None,
                    log_probs=sequence.last_log_probs,
                )
                for sequence in sampled
                if sequence.request_id in prompts
            ]
            batch_ids = step.prompts.batch_ids
            events.append(LocalPrefilled(batch_ids=batch_ids, results=results, num_free_blocks=num_free_blocks))
        if decoded:
            finished: dict[int, FinishReason] = {
                sequence.request_id: sequence.finish_reason
                for sequence in decoded
                if sequence.finish_reason is not None
            }
            events.append(
                StepTokens(
                    request_ids=[sequence.request_id for sequence in decoded],
                    token_ids=[sequence.last_token_id for sequence in decoded],
                    finished=finished,
                    log_probs={each.request_id: each.last_log_probs for each in decoded if each.last_log_probs},
                    num_free_blocks=num_free_blocks,
                )
            )
        return events + released

    def _retire_those_at_their_end(self) -> None:
        """Sequences whose unread token is the last that they may have run no further."""
        for request_id in self._launched_ids:
            sequence = self._running.get(request_id)  # None: a prompt that is not finished, or has only one token
            if sequence is None or request_id not in self._scheduler:
                continue
            if len(sequence.output_token_ids) + 1 >= sequence.sampling.max_tokens:
                self._scheduler.retire(request_id)

    def _cancel(self, request_ids: list[int]) -> list[WorkerEvent]:
        released = []
        for request_id in request_ids:
            if request_id in self._prompts:
                if self._prompts.cancel(request_id) or self._leave(request_id):
                    released.append(request_id)
            elif request_id in self._running:
                self._running[request_id].finish_reason = "cancelled"
                if self._leave(request_id):
                    released.append(request_id)
            elif request_id in self._arrivals and self._arrivals.cancel(request_id):
                released.append(request_id)
        return self._released(released) + self._swap_report()

    def _detach(self, address: str) -> list[WorkerEvent]:
        """Gives up what has not arrived from a dead source, lets its copies end, and closes the mapping."""
        lost = self._arrivals.from_source(address)
        events = self._cancel(lost)
        while any(request_id in self._arrivals for request_id in lost):
            self._arrivals.wait(1e-3)
            events += self._join()
        self.peers.detach(address)
        return [*events, Detached(address=address)]

    def _leave(self, request_id: int) -> bool:
        """Ends a sequence; True if its blocks are free now, not only after the launched step or a copy."""
        if request_id in self._launched_ids:
            if request_id in self._scheduler:
                self._scheduler.retire(request_id)
            return False
        if request_id in self._prompts:
            self._prompts.take(request_id)
            self.engine.blocks.free(Owner("sequence", request_id))
            return True
        del self._running[request_id]
        return self._scheduler.remove(request_id)

    def _released(self, request_ids: list[int]) -> list[WorkerEvent]:
        if not request_ids:
            return []
        return [Released(request_ids=request_ids, num_free_blocks=self.engine.blocks.num_free_blocks)]

    def _swap_report(self) -> list[WorkerEvent]:
        """What is new since the last report."""
        before = self._reported
        self._reported = SwapReport(
            num_swapped_seqs=self._scheduler.num_swapped_seqs,
            num_preemptions=self._num_preemptions,
            bytes_out=self._swap_bytes["out"],
            bytes_in=self._swap_bytes["in"],
        )
        if self._reported == before:
            return []
        return [
            SwapReport(
                num_swapped_seqs=self._reported.num_swapped_seqs,
                num_preemptions=self._reported.num_preemptions - before.num_preemptions,
                bytes_out=self._reported.bytes_out - before.bytes_out,
                bytes_in=self._reported.bytes_in - before.bytes_in,
            )
        ]
