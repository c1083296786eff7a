"""Prompts that a decode worker computes itself: in colocated mode all of them, else short ones now and then.

    PrefillBatch --> queued --room for its prompts' blocks--> rows of a step --last chunk--> decodes here
                       |                                           |
                       +------------- CancelRequests --------------+--> blocks free when its last launched step has run

The scheduler forms the batches and knows what fits in the end; when that is, is known here, as for arrivals from
prefill workers.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.engine.batch import PrefillRow
from ensemble.request import Request, Sequence
from ensemble.workers.messages import PrefillBatch, PrefillChunk


@dataclass(frozen=True, slots=True)
class _Chunk:
    chunk: PrefillChunk
    ends_batch: int | None  # the id of the batch whose last chunk this is


@dataclass(slots=True, eq=False)
class LocalStep:
    """The prompts' part of one step."""

    rows: list[PrefillRow] = field(default_factory=list)
    batch_ids: list[int] = field(default_factory=list)  # answered when the step has run


class LocalPrefill:
    """Owns the blocks of its sequences until they are taken out by `take`."""

    def __init__(self, blocks: BlockManager, max_num_tokens: int) -> None:
        self._blocks = blocks
        self._max_num_tokens = max_num_tokens  # of prompts, in a step
        self._chunks: deque[_Chunk] = deque()
        self._sequences: dict[int, Sequence] = {}  # request_id |-> has blocks, its prompt is not finished
        self._queued: dict[int, Request] = {}  # request_id |-> has no blocks yet
        self._cost_tokens, self._cost_s = 0, 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._chunks)

    @property
    def num_wanted_blocks(self) -> int:
        """Blocks that the first of the prompts without any lacks."""
        first = next(iter(self._queued.values()), None)
        return 0 if first is None else self._blocks.blocks_for(first.prompt_len)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences or request_id in self._queued

    def add(self, batch: PrefillBatch) -> None:
        last = len(batch.chunks) - 1
        for index, chunk in enumerate(batch.chunks):
            self._chunks.append(_Chunk(chunk, batch.batch_id if index == last else None))
            if chunk.request is not None:
                self._queued[chunk.request_id] = chunk.request

    def next_step(self, has_room_for: Callable[[int], bool]) -> LocalStep:
        """Takes chunks in order as far as the budget goes, also of several batches.

        A prompt that waits for blocks holds up those that want some after it, but not the next chunks of those that
        have theirs: these blocks can be neither swapped nor freed before the prompt has decoded.
        """
        step = LocalStep()
        lengths: dict[int, int] = {}  # request_id |-> tokens in this step
        waiting: deque[_Chunk] = deque()
        num_left_tokens = self._max_num_tokens
        while self._chunks and self._chunks[0].chunk.length <= num_left_tokens:
            each = self._chunks.popleft()
            request_id, request = each.chunk.request_id, self._queued.get(each.chunk.request_id)
            if request is not None:
                num_blocks = self._blocks.blocks_for(request.prompt_len)
                if waiting or not has_room_for(num_blocks):
                    waiting.append(each)
                    continue
                self._allocate(self._queued.pop(request_id), num_blocks)
            if each.ends_batch is not None:
                step.batch_ids.append(each.ends_batch)
            sequence = self._sequences.get(request_id)
            if sequence is not None and not sequence.is_finished:  # else it was cancelled meanwhile
                lengths[request_id] = lengths.get(request_id, 0) + each.chunk.length
                num_left_tokens -= each.chunk.length
        self._chunks.extendleft(reversed(waiting))
        for request_id, length in lengths.items():
            sequence = self._sequences[request_id]
            step.rows.append(PrefillRow(sequence, sequence.num_computed_tokens, length))
        return step

    def take(self, request_id: int) -> Sequence:
        """Gives a sequence away, and the duty to free its blocks."""
        return self._sequences.pop(request_id)

    def cancel(self, request_id: int) -> bool:
        """Ends a request. True if that is all; False if it has blocks: to be taken when no launched step uses them."""
        if self._queued.pop(request_id, None) is not None:
            return True
        self._sequences[request_id].finish_reason = "cancelled"
        return False

    def ran(self, step: LocalStep, seconds: float) -> None:
        """A step with these rows took so long."""
        if step.rows:
            self._cost_tokens += sum(row.length for row in step.rows)
            self._cost_s += seconds

    def cost_s(self, num_tokens: int) -> float:
        """What computing so many tokens has cost on average; 0 before any was."""
        return num_tokens * self._cost_s / self._cost_tokens if self._cost_tokens else 0.0

    def _allocate(self, request: Request, num_blocks: int) -> None:
        block_ids = self._blocks.allocate(Owner("sequence", request.request_id), num_blocks)
        self._sequences[request.request_id] = Sequence(request, block_ids=block_ids)
