"""Which prompts run in the next prefill batch, and at which replica.

queued --first chunk--> at a replica --last chunk--> leased --released--> gone
[one queue, late binding]  [all blocks of the prompt are held from the first chunk until the replica releases them]
"""

from collections.abc import Callable, Iterable, KeysView
from dataclasses import dataclass, field

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints, QueuePolicy
from ensemble.scheduling.prefiller import Chunk, Limits, Prefiller, Prompt, PromptBatch
from ensemble.scheduling.waiting_queue import WaitingQueue

# (replica, request): asked last, when everything else allows the request to start there; answering True starts it.
# If it stays there, its whole way has been booked then.
MayStart = Callable[[int, Request], bool]


@dataclass(slots=True)
class _Filling:
    """A batch that is being filled."""

    num_left_tokens: int
    lengths: dict[int, int] = field(default_factory=dict)  # request_id |-> tokens of it in this batch

    def add(self, prompt: Prompt, most: int) -> int:
        """As much of what is left of the prompt as there is room for, and no more than `most`. Returns how much."""
        request_id = prompt.request.request_id
        there = self.lengths.get(request_id, 0)
        length = min(prompt.num_left_tokens - there, self.num_left_tokens, most)
        if length > 0:
            self.lengths[request_id] = there + length
            self.num_left_tokens -= length
        return length


class PrefillScheduler:
    """The queue of waiting requests, and who computes their prompts. `now` is in seconds and does not go back."""

    def __init__(
        self,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_batches_in_flight: int,
        max_queue_requests: int,
        max_queue_tokens: int,
        policy: QueuePolicy | None = None,
        max_long_tokens: int | None = None,
        num_cached_tokens: Callable[[int, Request], int] = lambda replica, request: 0,
        limits_now: Callable[[int, Limits], Limits] = lambda replica, limits: limits,
    ) -> None:
        """`num_cached_tokens(replica, request)`: how much of a prompt, never all, the replica is taken to have cached.

        The first chunk starts there; a replica that finds less computes the difference with it.
        `limits_now(replica, limits)`: what of its limits holds at the moment.
        """
        self.block_size = block_size
        self.limits = Limits(max_num_batched_tokens, max_batches_in_flight)  # of replicas that hand all off
        self.max_num_seqs = max_num_seqs  # chunks in a batch
        self.max_long_tokens = max_long_tokens  # of a batch, for prompts longer than that while shorter ones wait
        self._num_cached_tokens = num_cached_tokens
        self._limits_now = limits_now
        self._waiting = WaitingQueue(max_queue_requests, max_queue_tokens, policy, max_long_tokens)
        self._prefillers: dict[int, Prefiller] = {}
        self._max_prompt_lens: dict[int, int] = {}  # replica |-> longest prompt it takes, kept while it is down
        self._replica_of: dict[int, int] = {}  # request_id |-> replica, from the first chunk until the release
        self._held: dict[int, int] = {}  # request_id |-> tokens that are on their way: its replica waits for these
        self._num_batches = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def num_waiting_each(self) -> float:
        """For each replica that takes prompts."""
        return len(self._waiting) / max(1, len(self._max_prompt_lens))

    def tokens_per_s(self, now: float) -> float:
        """Of the prompts that were started lately."""
        return self._waiting.tokens_per_s(now)

    @property
    def max_prompt_len(self) -> int | None:
        """Tokens of the longest prompt that any replica takes; None as long as no replica was ever up."""
        return max(self._max_prompt_lens.values(), default=None)

    def add(
        self,
        request: Request,
        now: float,
        hints: Hints = DEFAULT_HINTS,
        *,
        is_again: bool = False,
        is_sharing: bool = False,
    ) -> None:
        """Queues a request. Raises Overloaded if the queue is full, InvalidRequest if no replica could ever hold it.

        `is_again`: it was computed before, and what it had is lost. It goes before all others and is never refused.
        `is_sharing`: it does not start before `share`.
        """
        limit = None if is_again else self.max_prompt_len
        if limit is not None and request.prompt_len > limit:
            raise InvalidRequest(
                "length of input_ids or text_input", request.prompt_len, f"the prefill pool holds {limit} tokens"
            )
        if request.request_id in self._replica_of:
            raise InternalError(f"request {request.request_id} is already in prefill")
        self._waiting.add(request, now, hints, is_again=is_again, is_sharing=is_sharing)

    def share(self, request_id: int) -> None:
        """The prompt of a request that waited for another to compute it is in a prefix cache."""
        self._waiting.share(request_id)

    def replica_up(self, replica: int, credits: Credits, limits: Limits | None) -> list[int]:
        """Takes a replica with an empty pool into service; without `limits` it takes no prompts for now.

        Returns the requests that were queued before any pool was known and that no known pool could ever hold; they
        have left the queue.
        """
        if replica in self._prefillers:
            raise InternalError(f"replica {replica} is already up")
        self._prefillers[replica] = Prefiller(credits, limits)
        return self.set_limits(replica, limits)

    def set_limits(self, replica: int, limits: Limits | None) -> list[int]:
        """Changes what new prompts a replica that is up takes; those that have begun there go on. See `replica_up`."""
        prefiller = self._prefillers[replica]
        prefiller.limits = limits
        self._max_prompt_lens.pop(replica, None)
        if (longest_here := prefiller.max_prompt_len(self.block_size)) is not None:
            self._max_prompt_lens[replica] = longest_here
        self._hold_back()
        longest = self.max_prompt_len
        if longest is None:
            return []
        return [request.request_id for request in self._waiting.remove_longer_than(longest)]

    def replica_down(self, replica: int) -> None:
        """Forgets a replica, and which requests are there."""
        gone = self._prefillers.pop(replica, None)
        if gone is not None:
            self._held = {each: num_tokens for each, num_tokens in self._held.items() if each not in gone.prompts}
            self._replica_of = {request_id: at for request_id, at in self._replica_of.items() if at != replica}
            self._hold_back()

    def replica_removed(self, replica: int) -> None:
        """It does not come back: its pool counts no more."""
        self.replica_down(replica)
        self._max_prompt_lens.pop(replica, None)

    def next_batch(self, now: float, may_start: MayStart) -> PromptBatch | None:
        """The next batch for the least loaded replica that can run one; None if nothing can run now.

        What a replica has cached of the request to start next counts as load that it does not have. The head of the
        queue waits for blocks, nothing overtakes it. Prompts that have begun go on first, but those longer
        than `max_long_tokens` take no more than that of a batch as long as shorter ones can use the rest. A prompt's
        next chunk may follow while the one before is in flight, because a replica runs its batches in order.
        """
        while True:
            num_waiting = len(self._waiting)
            batch = self._next_batch(now, may_start)
            if batch is not None or len(self._waiting) == num_waiting:
                return batch
            # What has been started is held: who comes after it may start at a replica that was asked before.

    def _next_batch(self, now: float, may_start: MayStart) -> PromptBatch | None:
        head = self._waiting.head(now)

        def load(replica: int) -> tuple[bool, int]:
            num_cached_tokens = 0 if head is None else self._num_cached_tokens(replica, head)
            prefiller = self._prefillers[replica]
            stays = prefiller.limits is not None and prefiller.limits.stays
            return stays, prefiller.num_outstanding_tokens - num_cached_tokens

        for replica in sorted(self._prefillers, key=load):
            prefiller = self._prefillers[replica]
            if head is None and not prefiller.prompts:
                continue
            limits = self._limits_now(replica, prefiller.limits or self.limits)  # what has begun goes on
            if len(prefiller.batches) >= limits.max_batches_in_flight:
                continue
            chunks = self._chunks(replica, limits, now, may_start)
            if chunks:
                batch_id = self._num_batches
                self._num_batches += 1
                prefiller.batches[batch_id] = PromptBatch(replica, batch_id, chunks)
                return prefiller.batches[batch_id]
        return None

    def backlog(self, replica: int) -> tuple[int, int]:
        """Prompt tokens that the replica has yet to compute, and the keys that they attend to."""
        return self._prefillers[replica].backlog

    @property
    def held_ids(self) -> KeysView[int]:
        return self._held.keys()

    def hold(self, request_id: int, num_tokens: int) -> None:
        """Of a prompt that is being started no chunk goes out until `resume`: so much of it is to be cached there."""
        self._held[request_id] = num_tokens

    def resume(self, request_id: int, num_tokens: int) -> None:
        """So many tokens, or what the replica is taken to have anyway, are cached there."""
        del self._held[request_id]
        replica = self._replica_of[request_id]
        prompt = self._prefillers[replica].prompts[request_id]
        num_cached_tokens = max(num_tokens, self._num_cached_tokens(replica, prompt.request))
        prompt.num_dispatched_tokens = min(num_cached_tokens, prompt.request.prefill_len - 1)

    def unsent_at(self, request_id: int) -> int | None:
        """The replica at which a prompt has been started, but which has been sent nothing of it: it knows nothing."""
        replica = self._replica_of.get(request_id)
        prompt = None if replica is None else self._prefillers[replica].prompts.get(request_id)
        return None if prompt is None or prompt.has_begun else replica

    def unfinished(self, replica: int) -> list[int]:
        """Requests whose prompts are being computed there, or have begun."""
        return self._prefillers[replica].unfinished if replica in self._prefillers else []

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts output tokens served to a tenant, which `fair` goes by; prompts are counted when they start."""
        self._waiting.charge(tenant, num_tokens)

    def batch_done(self, replica: int, batch_id: int) -> None:
        """A batch has run, or has failed. Unknown batches (of a replica that went down) are ignored."""
        if replica in self._prefillers:
            self._prefillers[replica].batches.pop(batch_id, None)

    def released(self, replica: int, request_ids: Iterable[int]) -> None:
        """The replica has freed the blocks of these requests. Requests that are not there are ignored."""
        prefiller = self._prefillers.get(replica)
        if prefiller is None:
            return
        for request_id in request_ids:
            prefiller.credits.release(request_id)
            prefiller.prompts.pop(request_id, None)
            self._held.pop(request_id, None)
            if self._replica_of.get(request_id) == replica:
                del self._replica_of[request_id]

    def cancel(self, request_id: int) -> None:
        """No further chunk of it is dispatched. A replica with its blocks has to be told, and reports the release."""
        self._waiting.remove(request_id)
        replica = self._replica_of.get(request_id)
        if replica is not None:
            self._prefillers[replica].prompts.pop(request_id, None)
            self._held.pop(request_id, None)

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other or a bound is passed."""
        self._waiting.check_integrity()
        for replica, prefiller in self._prefillers.items():
            prefiller.credits.check_integrity()
            if not prefiller.prompts.keys() <= set(prefiller.credits.request_ids):
                raise InternalError(f"replica {replica} has unfinished prompts that hold no blocks")
        for request_id, replica in self._replica_of.items():
            if request_id not in self._prefillers[replica].credits:
                raise InternalError(f"request {request_id} was started at replica {replica} and holds nothing there")

    def _hold_back(self) -> None:
        """Requests that only a replica could hold which is down, or takes no prompts, do not stand before others."""
        longest = [each.max_prompt_len(self.block_size) for each in self._prefillers.values()]
        self._waiting.hold_back(max((each for each in longest if each is not None), default=None))

    def _chunks(self, replica: int, limits: Limits, now: float, may_start: MayStart) -> list[Chunk]:
        filling = _Filling(limits.max_num_batched_tokens)
        if self.max_long_tokens is not None:
            self._fill(filling, self.max_long_tokens, replica, now, may_start)
        self._fill(filling, filling.num_left_tokens, replica, now, may_start)
        prefiller = self._prefillers[replica]
        return [prefiller.dispatch(request_id, length) for request_id, length in filling.lengths.items()]

    def _fill(self, filling: _Filling, num_long_tokens: int, replica: int, now: float, may_start: MayStart) -> None:
        """Gives the tokens that are left to prompts, at most `num_long_tokens` of them to long ones."""
        begun = iter(list(self._prefillers[replica].prompts.values()))
        while filling.num_left_tokens > 0:
            is_full = len(filling.lengths) == self.max_num_seqs
            prompt = next(begun, None)
            if prompt is None and not is_full:
                prompt = self._start(replica, now, num_long_tokens == 0, may_start)
            if prompt is None:
                return
            request_id = prompt.request.request_id
            if request_id in self._held or (is_full and request_id not in filling.lengths):
                continue
            if self._waiting.is_long(prompt.request):
                num_long_tokens -= filling.add(prompt, num_long_tokens)
            else:
                filling.add(prompt, filling.num_left_tokens)

    def _start(self, replica: int, now: float, only_short: bool, may_start: MayStart) -> Prompt | None:
        prefiller = self._prefillers[replica]
        request = self._waiting.head(now)
        if request is None or not prefiller.fits(request, self._blocks_for(request)):
            return None
        if only_short and self._waiting.is_long(request):
            request = self._waiting.head(now, only_short=True)
            if request is None or not prefiller.fits(request, self._blocks_for(request)):
                return None
        if not may_start(replica, request):
            return None
        request_id = request.request_id
        self._waiting.start(request_id, now)
        if request_id not in prefiller.credits:  # else it stays, and holds there what its whole way needs
            prefiller.credits.hold(request_id, self._blocks_for(request))
        self._replica_of[request_id] = replica
        num_cached_tokens = self._held.get(request_id) or self._num_cached_tokens(replica, request)
        prefiller.prompts[request_id] = Prompt(request, num_cached_tokens)
        return prefiller.prompts[request_id]

    def _blocks_for(self, request: Request) -> int:
        return -(-request.prefill_len // self.block_size)
