"""One replica as a place to compute prompts: what it takes, and what it has been given."""

from dataclasses import dataclass, field

from ensemble.request import Request
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.estimator import prompt_keys


@dataclass(frozen=True, slots=True)
class Limits:
    """What prompts a replica takes."""

    max_num_batched_tokens: int  # token budget of a batch
    max_batches_in_flight: int
    max_prompt_len: int | None = None  # longer prompts go elsewhere
    stays: bool = False  # prompts decode there; such a replica is asked when no other one can take a batch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of what a request has to prefill."""

    request: Request
    start: int
    length: int
    is_first: bool

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Chunks for one replica."""

    replica: int
    batch_id: int
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(slots=True)
class Prompt:
    """It has begun at a replica, and has tokens left to dispatch."""

    request: Request
    num_dispatched_tokens: int  # or taken to be in the replica's prefix cache
    has_begun: bool = False

    @property
    def num_left_tokens(self) -> int:
        return self.request.prefill_len - self.num_dispatched_tokens


@dataclass(slots=True)
class Prefiller:
    credits: Credits  # shared with Decoders
    limits: Limits | None  # None: it takes no new prompts
    prompts: dict[int, Prompt] = field(default_factory=dict)  # unfinished, in the order in which they began
    batches: dict[int, PromptBatch] = field(default_factory=dict)  # by batch_id, in flight

    @property
    def num_outstanding_tokens(self) -> int:
        in_flight = sum(batch.num_tokens for batch in self.batches.values())
        return in_flight + sum(prompt.num_left_tokens for prompt in self.prompts.values())

    @property
    def backlog(self) -> tuple[int, int]:
        """Prompt tokens that it has yet to compute, and the keys that they attend to."""
        parts = [(chunk.start, chunk.length) for batch in self.batches.values() for chunk in batch.chunks]
        parts += [(each.num_dispatched_tokens, each.num_left_tokens) for each in self.prompts.values()]
        return sum(length for _, length in parts), sum(prompt_keys(*part) for part in parts)

    @property
    def unfinished(self) -> list[int]:
        """Requests whose prompts are being computed, or have begun; those in several batches several times."""
        in_flight = (chunk.request_id for batch in self.batches.values() for chunk in batch.chunks)
        return [*self.prompts, *in_flight]

    def max_prompt_len(self, block_size: int) -> int | None:
        """Tokens of the longest prompt that it takes; None: it takes none."""
        if self.limits is None:
            return None
        pool_len = self.credits.num_blocks * block_size
        return min(pool_len, self.limits.max_prompt_len or pool_len)

    def fits(self, request: Request, num_blocks: int) -> bool:
        """Whether it takes this prompt now, which needs so many blocks."""
        if self.limits is None:
            return False
        is_short_enough = self.limits.max_prompt_len is None or request.prefill_len <= self.limits.max_prompt_len
        return is_short_enough and (self.limits.stays or self.credits.fits(num_blocks))

    def dispatch(self, request_id: int, length: int) -> Chunk:
        """So much more of a prompt."""
        prompt = self.prompts[request_id]
        chunk = Chunk(prompt.request, prompt.num_dispatched_tokens, length, is_first=not prompt.has_begun)
        prompt.num_dispatched_tokens += length
        prompt.has_begun = True
        if prompt.num_left_tokens == 0:
            del self.prompts[request_id]
        return chunk
