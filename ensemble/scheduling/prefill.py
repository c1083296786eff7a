"""Which prompts run in the next prefill batch, and at which replica.

queued --first chunk--> at a replica --last chunk--> leased --released--> gone
[one queue, late binding]  [all blocks of the prompt are held from the first chunk until the replica releases them]
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.waiting_queue import WaitingQueue
from ensemble.workers.messages import PrefillBatch, PrefillChunk


@dataclass(slots=True)
class _Prompt:
    """A prompt that has begun at a replica and has tokens left to dispatch."""

    request: Request
    num_dispatched_tokens: int = 0

    @property
    def num_left_tokens(self) -> int:
        return self.request.prompt_len - self.num_dispatched_tokens

    def next_chunk(self, max_num_tokens: int) -> PrefillChunk:
        start = self.num_dispatched_tokens
        length = min(self.num_left_tokens, max_num_tokens)
        self.num_dispatched_tokens += length
        request = self.request if start == 0 else None
        return PrefillChunk(request_id=self.request.request_id, start=start, length=length, request=request)


@dataclass(slots=True)
class _Replica:
    credits: Credits
    prompts: dict[int, _Prompt] = field(default_factory=dict)  # unfinished, in the order in which they began
    batches: dict[int, int] = field(default_factory=dict)  # batch_id |-> tokens, in flight

    @property
    def num_outstanding_tokens(self) -> int:
        return sum(self.batches.values()) + sum(prompt.num_left_tokens for prompt in self.prompts.values())


class PrefillScheduler:
    """The queue of waiting requests and the prefill replicas' credit. `now` is in seconds and does not go back."""

    def __init__(
        self,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_batches_in_flight: int,
        max_queue_requests: int,
        max_queue_tokens: int,
    ) -> None:
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens  # token budget of a batch
        self.max_num_seqs = max_num_seqs  # chunks in a batch
        self.max_batches_in_flight = max_batches_in_flight  # per replica
        self._waiting = WaitingQueue(max_queue_requests, max_queue_tokens)
        self._replicas: dict[int, _Replica] = {}
        self._pool_blocks: dict[int, int] = {}  # replica |-> pool size, kept while it is down
        self._replica_of: dict[int, int] = {}  # request_id |-> replica, from the first chunk until the release
        self._num_batches = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def max_prompt_len(self) -> int | None:
        """Tokens of the longest prompt that the largest pool holds; None as long as no replica was ever up."""
        return max(self._pool_blocks.values()) * self.block_size if self._pool_blocks else None

    def add(self, request: Request, now: float) -> None:
        """Queues a request. Raises Overloaded if the queue is full, InvalidRequest if no replica could ever hold it."""
        limit = self.max_prompt_len
        if limit is not None and request.prompt_len > limit:
            raise InvalidRequest(
                "length of input_ids or text_input", request.prompt_len, f"the prefill pool holds {limit} tokens"
            )
        if request.request_id in self._replica_of:
            raise InternalError(f"request {request.request_id} is already in prefill")
        self._waiting.add(request, now)

    def replica_up(self, replica: int, num_blocks: int) -> list[int]:
        """Takes a replica with an empty pool into service.

        Returns the requests that were queued before any pool was known and that no known pool could ever hold; they
        have left the queue.
        """
        if replica in self._replicas:
            raise InternalError(f"prefill replica {replica} is already up")
        self._replicas[replica] = _Replica(Credits(num_blocks))
        self._pool_blocks[replica] = num_blocks
        longest = max(self._pool_blocks.values()) * self.block_size
        return [request.request_id for request in self._waiting.remove_longer_than(longest)]

    def replica_down(self, replica: int) -> list[int]:
        """Forgets a replica. Returns the requests that were in prefill there or whose blocks were leased there."""
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        for request_id in gone.credits.request_ids:
            del self._replica_of[request_id]
        return gone.credits.request_ids

    def next_batch(self, now: float, may_start: Callable[[Request], bool]) -> PrefillBatch | None:
        """The next batch for the least loaded replica that can run one; None if nothing can run now.

        `may_start` is asked last, when everything else allows a new request to start: answering True starts it. The
        head of the queue waits for blocks, nothing overtakes it. A prompt's next chunk may follow while the one before
        is in flight, because a replica runs its batches in order.
        """
        for replica, state in sorted(self._replicas.items(), key=lambda item: item[1].num_outstanding_tokens):
            if len(state.batches) >= self.max_batches_in_flight:
                continue
            chunks = self._chunks(replica, state, now, may_start)
            if chunks:
                batch_id = self._num_batches
                self._num_batches += 1
                state.batches[batch_id] = sum(chunk.length for chunk in chunks)
                return PrefillBatch(replica=replica, batch_id=batch_id, chunks=chunks)
        return None

    def batch_done(self, replica: int, batch_id: int) -> None:
        """A batch has run, or has failed. Unknown batches (of a replica that went down) are ignored."""
        if replica in self._replicas:
            self._replicas[replica].batches.pop(batch_id, None)

    def released(self, replica: int, request_ids: Iterable[int]) -> None:
        """The replica has freed the blocks of these requests. Requests that it does not hold are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for request_id in request_ids:
            if request_id in state.credits:
                state.credits.release(request_id)
                state.prompts.pop(request_id, None)
                del self._replica_of[request_id]

    def cancel(self, request_id: int) -> Literal["queued"] | int | None:
        """Ends a request: no further chunk of it is dispatched.

        Returns "queued" if it was waiting and is gone; the replica that holds its blocks, which has to be told and will
        report the release; None if the request is not here.
        """
        if self._waiting.remove(request_id) is not None:
            return "queued"
        replica = self._replica_of.get(request_id)
        if replica is not None:
            self._replicas[replica].prompts.pop(request_id, None)
        return replica

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other or a bound is passed."""
        self._waiting.check_integrity()
        holders: dict[int, int] = {}
        for replica, state in self._replicas.items():
            state.credits.check_integrity()
            holders.update((request_id, replica) for request_id in state.credits.request_ids)
            if not state.prompts.keys() <= holders.keys():
                raise InternalError(f"prefill replica {replica} has unfinished prompts that hold no blocks")
            if len(state.batches) > self.max_batches_in_flight:
                raise InternalError(f"prefill replica {replica} has {len(state.batches)} batches in flight")
            if max(state.batches.values(), default=0) > self.max_num_batched_tokens:
                raise InternalError(f"prefill replica {replica} has a batch above its token budget")
        if holders != self._replica_of:
            raise InternalError("requests in prefill and holders of credit differ")

    def _chunks(
        self, replica: int, state: _Replica, now: float, may_start: Callable[[Request], bool]
    ) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        num_left_tokens = self.max_num_batched_tokens
        while num_left_tokens > 0 and len(chunks) < self.max_num_seqs:
            prompt = self._unfinished(state) or self._start(replica, state, now, may_start)
            if prompt is None:
                break
            chunk = prompt.next_chunk(num_left_tokens)
            chunks.append(chunk)
            num_left_tokens -= chunk.length
            if prompt.num_left_tokens == 0:
                del state.prompts[chunk.request_id]
        return chunks

    @staticmethod
    def _unfinished(state: _Replica) -> _Prompt | None:
        return next(iter(state.prompts.values()), None)

    def _start(self, replica: int, state: _Replica, now: float, may_start: Callable[[Request], bool]) -> _Prompt | None:
        request = self._waiting.head()
        if request is None:
            return None
        num_blocks = -(-request.prompt_len // self.block_size)
        if not state.credits.fits(num_blocks) or not may_start(request):
            return None
        self._waiting.pop(now)
        state.credits.hold(request.request_id, num_blocks)
        self._replica_of[request.request_id] = replica
        state.prompts[request.request_id] = _Prompt(request)
        return state.prompts[request.request_id]
