"""The prefill worker: runs batches of prompt chunks in order, and keeps finished prompts' blocks under lease until the
reader acknowledges its copy.

    PrefillBatch ---> sequence (blocks reserved at its first chunk) --last chunk--> lease --TransferDone--> free
                          |                                                           |
                          +------------------ CancelRequests -------------------------+--> free
"""

import time
from collections import deque
from dataclasses import dataclass

import torch

from ensemble.cache.block_manager import Owner
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.engine import Engine, Launched
from ensemble.request import Request, Sequence
from ensemble.workers.messages import (
    AttachPeer,
    CancelRequests,
    Command,
    DetachPeer,
    KVHandoff,
    PrefillAnswer,
    PrefillBatch,
    PrefillResult,
    PrefixReport,
    Released,
    Reserved,
    SubmitDecode,
    WorkerEvent,
)
from kernels.block_copy import copy_blocks


@dataclass(frozen=True, slots=True)
class _LaunchedBatch:
    batch_id: int
    start: float
    step: Launched | None  # None: all of it was cancelled


class PrefillWorker:
    """Decides nothing: the scheduler's credit says what fits. `peer_address` goes into the hand-off messages."""

    def __init__(self, engine: Engine, peer_address: str, prefix_cache: bool = False) -> None:
        self.engine = engine
        self.cache = PrefixCache(engine.blocks) if prefix_cache else None
        self._blocks = self.cache or engine.blocks
        self._num_reported_tokens = (0, 0)  # asked of the cache, and found
        self._peer_address = peer_address
        self._batches: deque[PrefillBatch] = deque()
        self._launched: _LaunchedBatch | None = None
        self._sequences: dict[int, Sequence] = {}  # request_id |-> a prompt in prefill
        self._leases: dict[int, int] = {}  # transfer_id |-> request_id
        self._transfers: dict[int, int] = {}  # request_id |-> transfer_id, the inverse
        self._num_transfers = 0

    @property
    def has_work(self) -> bool:
        return bool(self._batches) or self._launched is not None

    @property
    def waits_for_gpu(self) -> bool:
        """All that came is launched and has not run: the next batch, should it come meanwhile, need not wait for it."""
        step = self._launched.step if self._launched is not None else None
        return not self._batches and step is not None and not step.handle.is_done

    def handle(self, command: Command) -> list[WorkerEvent]:
        match command:
            case PrefillBatch():
                self._reserve(command)
                return [Reserved(num_free_blocks=self._blocks.num_free_blocks), *self._prefix_report()]
            case CancelRequests(request_ids=request_ids):
                return self._cancel(request_ids)
            case SubmitDecode() | AttachPeer() | DetachPeer():
                raise TypeError(f"a prefill worker was sent {type(command).__name__}")

    def step(self) -> list[WorkerEvent]:
        """Launches the oldest batch, and answers the one launched before; on a CPU the same one."""
        launched = self._launch(self._batches.popleft()) if self._batches else None
        if launched is not None and self.engine.runs_ahead:
            launched, self._launched = self._launched, launched
        elif launched is None:
            launched, self._launched = self._launched, None
        return self._answer(launched) if launched is not None else []

    def _launch(self, batch: PrefillBatch) -> _LaunchedBatch:
        rows = []
        for chunk in batch.chunks:
            sequence = self._sequences.get(chunk.request_id)  # none: cancelled meanwhile
            # The cache may hold more or less of the prompt than the scheduler took it to when it cut this chunk.
            num_tokens = chunk.start + chunk.length - sequence.num_computed_tokens if sequence is not None else 0
            if sequence is not None and num_tokens > 0:
                rows.append(PrefillRow(sequence, sequence.num_computed_tokens, num_tokens))
        start = time.perf_counter()
        return _LaunchedBatch(batch.batch_id, start, self.engine.launch(Batch(rows, [])) if rows else None)

    def _answer(self, launched: _LaunchedBatch) -> list[WorkerEvent]:
        sampled = self.engine.commit(launched.step) if launched.step is not None else []
        if self.cache is not None and launched.step is not None:
            for row in launched.step.batch.prefills:
                if row.sequence.request_id in self._sequences:
                    self.cache.commit(Owner("sequence", row.sequence.request_id), row.end)
        results = [self._leave_prefill(sequence) for sequence in sampled]
        seconds = time.perf_counter() - launched.start
        answer = PrefillAnswer(batch_id=launched.batch_id, results=results, compute_s=seconds)
        released = self._released([result.request_id for result in results if result.handoff is None])
        return [answer, *released, *self._prefix_report()]

    def end_leases(self, transfer_ids: list[int]) -> list[WorkerEvent]:
        """The reader has its copies; an unknown lease was ended by a cancel before."""
        request_ids = [self._leases.pop(transfer_id) for transfer_id in transfer_ids if transfer_id in self._leases]
        for request_id in request_ids:
            self._blocks.free(Owner("transfer", self._transfers.pop(request_id)))
        return self._released(request_ids)

    def _reserve(self, batch: PrefillBatch) -> None:
        for chunk in batch.chunks:
            if chunk.request is not None:
                self._sequences[chunk.request_id] = self._allocate(chunk.request)
        self._batches.append(batch)

    def _allocate(self, request: Request) -> Sequence:
        owner, num_blocks = Owner("sequence", request.request_id), self.engine.blocks.blocks_for(request.prompt_len)
        if self.cache is None:
            return Sequence(request, block_ids=self.engine.blocks.allocate(owner, num_blocks))
        found = self.cache.allocate(owner, request.prompt_token_ids, num_blocks)
        if found.copies:
            pool = self.engine.pool.tensor
            source_ids, target_ids = torch.tensor(found.copies, device=pool.device).T
            copy_blocks(pool, pool, source_ids.contiguous(), target_ids.contiguous())
        return Sequence(request, num_computed_tokens=found.num_cached_tokens, block_ids=found.block_ids)

    def _leave_prefill(self, sequence: Sequence) -> PrefillResult:
        request_id = sequence.request_id
        del self._sequences[request_id]
        owner = Owner("sequence", request_id)
        handoff = None
        if sequence.is_finished:
            self._blocks.free(owner)
        else:
            transfer_id = self._num_transfers
            self._num_transfers += 1
            self._blocks.reassign(owner, Owner("transfer", transfer_id))
            self._leases[transfer_id] = request_id
            self._transfers[request_id] = transfer_id
            handoff = KVHandoff(
                transfer_id=transfer_id,
                source=self._peer_address,
                request=sequence.request,
                output_token_ids=sequence.output_token_ids,
                num_kv_tokens=sequence.num_computed_tokens,
                block_ids=sequence.block_ids,
            )
        return PrefillResult(
            request_id=request_id,
            token_id=sequence.last_token_id,
            finish_reason=sequence.finish_reason,
            handoff=handoff,
            log_probs=sequence.last_log_probs,
        )

    def _cancel(self, request_ids: list[int]) -> list[WorkerEvent]:
        released: list[int] = []
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.finish_reason = "cancelled"
                self._blocks.free(Owner("sequence", request_id))
                released.append(request_id)
            elif request_id in self._transfers:
                transfer_id = self._transfers.pop(request_id)
                del self._leases[transfer_id]
                self._blocks.free(Owner("transfer", transfer_id))
                released.append(request_id)
        return self._released(released)

    def _released(self, request_ids: list[int]) -> list[WorkerEvent]:
        if not request_ids:
            return []
        return [Released(request_ids=request_ids, num_free_blocks=self._blocks.num_free_blocks)]

    def _prefix_report(self) -> list[WorkerEvent]:
        if self.cache is None:
            return []
        stored, evicted = self.cache.take_events()
        num_queried_before, num_hit_before = self._num_reported_tokens
        self._num_reported_tokens = self.cache.num_queried_tokens, self.cache.num_hit_tokens
        num_queried = self.cache.num_queried_tokens - num_queried_before
        if not (stored or evicted or num_queried):
            return []
        return [
            PrefixReport(
                stored=stored,
                evicted=evicted,
                num_queried_tokens=num_queried,
                num_hit_tokens=self.cache.num_hit_tokens - num_hit_before,
            )
        ]
