"""Prompts that a replica has been given to compute, and what of them goes into the next step.

    RunPrompts --> queued --room for its blocks--> rows of steps --last chunk--> decodes here, or is leased to a reader
                      |                                 |
                      +-------- CancelRequests ---------+--> blocks free when its last launched step has run

The router forms the batches and knows what fits in the end; when that is, is known here, as for arrivals from other
replicas.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.engine.batch import PrefillRow
from ensemble.protocol.router_replica import KVHandoff, PromptChunk, RunPrompts
from ensemble.replicas.launched_steps import LaunchedSteps, Step
from ensemble.replicas.lending import Lending
from ensemble.request import Request, Sequence


@dataclass(frozen=True, slots=True)
class _Chunk:
    chunk: PromptChunk
    ends_batch: int | None  # the id of the batch whose last chunk this is


@dataclass(slots=True, eq=False)
class PromptStep:
    """The prompts' part of one step."""

    rows: list[PrefillRow] = field(default_factory=list)
    batch_ids: list[int] = field(default_factory=list)  # that have run to their ends with it


class Prompts:
    """Owns the blocks of its sequences until they are lent, or taken out by `take`."""

    def __init__(
        self,
        blocks: BlockManager | PrefixCache,
        launched: LaunchedSteps,
        lending: Lending,
        copy_blocks: Callable[[list[int], list[int]], None],  # within the pool: block source[i] |-> block target[i]
    ) -> None:
        self._blocks = blocks
        self._launched = launched
        self._lending = lending
        self._copy_blocks = copy_blocks
        self._chunks: deque[_Chunk] = deque()
        self._sequences: dict[int, Sequence] = {}  # request_id |-> has blocks, its prompt is not finished
        self._queued: dict[int, Request] = {}  # request_id |-> has no blocks yet
        self._staying: set[int] = set()  # request ids that decode here
        self._num_behind = 0.0  # prompts that the router had yet to send when it sent the last batch
        self.pace = inf  # as the router said with it
        self._cost_tokens, self._cost_s = 0, 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._chunks)

    @property
    def next_start(self) -> int:
        """Where the next chunk begins in its prompt."""
        return self._num_computed(self._chunks[0].chunk.request_id) if self._chunks else 0

    @property
    def num_waiting(self) -> float:
        """Prompts that are here, and those that wait for these."""
        return len(self._sequences) + len(self._queued) + self._num_behind

    def _num_computed(self, request_id: int) -> int:
        sequence = self._sequences.get(request_id)
        return sequence.num_computed_tokens if sequence is not None else 0

    @property
    def num_wanted_blocks(self) -> int:
        """Blocks that the first of the prompts without any lacks."""
        first = next(iter(self._queued.values()), None)
        return 0 if first is None else self._blocks.blocks_for(first.prefill_len)

    @property
    def request_ids(self) -> list[int]:
        return [*self._sequences, *self._queued]

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences or request_id in self._queued

    def stays(self, request_id: int) -> bool:
        """Whether it decodes here when its prompt is finished."""
        return request_id in self._staying

    def add(self, batch: RunPrompts) -> None:
        self._num_behind, self.pace = batch.num_behind, batch.pace
        last = len(batch.chunks) - 1
        for index, chunk in enumerate(batch.chunks):
            self._chunks.append(_Chunk(chunk, batch.batch_id if index == last else None))
            if chunk.request is not None:
                self._queued[chunk.request_id] = chunk.request
                if chunk.stays:
                    self._staying.add(chunk.request_id)

    def next_step(self, max_num_tokens: int, has_room_for: Callable[[int], bool]) -> PromptStep:
        """Takes chunks in order up to `max_num_tokens`, also of several batches, the last one in part.

        A prompt that waits for blocks holds up those that want some after it, but not the next chunks of those that
        have theirs: these blocks can be neither swapped nor freed before the prompt is finished.
        """
        step = PromptStep()
        ends: dict[int, int] = {}  # request_id |-> position up to which this step computes
        waiting: deque[_Chunk] = deque()
        num_left_tokens = max_num_tokens
        while self._chunks:
            each = self._chunks[0]
            request_id = each.chunk.request_id
            if request_id in self._queued:
                num_blocks = self._blocks.blocks_for(self._queued[request_id].prefill_len)
                if waiting or not has_room_for(num_blocks):
                    waiting.append(self._chunks.popleft())
                    continue
                self._sequences[request_id] = self._allocate(self._queued.pop(request_id), num_blocks)
            sequence = self._sequences.get(request_id)
            if sequence is not None and not sequence.is_finished:  # else it was cancelled meanwhile
                # The cache may hold more or less of the prompt than the router took it to when it cut this chunk.
                begin = ends.get(request_id, sequence.num_computed_tokens)
                length = min(each.chunk.end - begin, num_left_tokens)
                if length > 0:
                    ends[request_id] = begin + length
                    num_left_tokens -= length
                if begin + length < each.chunk.end:
                    break  # the rest of it comes first in the next step
            self._chunks.popleft()
            if each.ends_batch is not None:
                step.batch_ids.append(each.ends_batch)
        self._chunks.extendleft(reversed(waiting))
        for request_id, end in ends.items():
            sequence = self._sequences[request_id]
            step.rows.append(PrefillRow(sequence, sequence.num_computed_tokens, end - sequence.num_computed_tokens))
        return step

    def take(self, request_id: int) -> Sequence:
        """Gives a sequence away, and the duty to free its blocks."""
        self._staying.discard(request_id)
        return self._sequences.pop(request_id)

    def cancel(self, request_id: int) -> bool:
        """True if it has left: it had no blocks, or they are free."""
        if self._queued.pop(request_id, None) is not None:
            self._staying.discard(request_id)
            return True
        self._sequences[request_id].finish_reason = "cancelled"
        return self.leave(request_id)

    def leave(self, request_id: int) -> bool:
        """Ends a sequence. True if it has left: no launched step uses it, and its blocks are free."""
        if request_id in self._launched.request_ids:
            return False
        self._launched.forget(request_id)
        self.take(request_id)
        self._blocks.free(Owner("sequence", request_id))
        return True

    def share(self, step: Step) -> None:
        """What the step has computed, others may begin with."""
        if isinstance(self._blocks, PrefixCache):
            for row in step.launched.batch.prefills:
                if (owner := Owner("sequence", row.sequence.request_id)) in self._blocks:
                    self._blocks.commit(owner, row.end)

    def lend(self, step: Step) -> list[KVHandoff]:
        """Prompts that the step has finished, without ending them, and that go on elsewhere."""
        handoffs = []
        for sequence in step.finished_prompts:
            request_id = sequence.request_id
            if not sequence.is_finished and request_id in self and not self.stays(request_id):
                self._launched.forget(request_id)
                handoffs.append(self._lending.offer(self.take(request_id)))
        return handoffs

    def ran(self, step: PromptStep, seconds: float) -> None:
        """A step with these rows took so long."""
        if step.rows:
            self._cost_tokens += sum(row.length for row in step.rows)
            self._cost_s += seconds

    def cost_s(self, num_tokens: int) -> float:
        """What computing so many tokens has cost on average; 0 before any was."""
        return num_tokens * self._cost_s / self._cost_tokens if self._cost_tokens else 0.0

    def _allocate(self, request: Request, num_blocks: int) -> Sequence:
        sequence, owner = Sequence.of(request), Owner("sequence", request.request_id)
        if isinstance(self._blocks, BlockManager):
            sequence.block_ids = self._blocks.allocate(owner, num_blocks)
            return sequence
        found = self._blocks.allocate_prompt(owner, sequence.token_ids(0, sequence.num_tokens), num_blocks)
        if found.copies:
            self._copy_blocks([source for source, _ in found.copies], [target for _, target in found.copies])
        sequence.block_ids, sequence.num_computed_tokens = found.block_ids, found.num_cached_tokens
        return sequence
