"""`Request`, what was asked, and `Sequence`, its running state: the two nouns that travel through the system.

    Request   frozen, made once from the client's tensors, serialised with msgspec between processes
    Sequence  lives in one engine at a time; prefill makes it, the hand-off message moves it to decode

Lengths of a sequence, in tokens:

    |<------------- prompt ------------->|<------ output ------>|
    |<---------- num_computed_tokens (KV in the pool) ------->|
    |<------------------------- num_tokens ------------------>|x|   the last sampled token has no KV yet
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen, and when to stop. Names, defaults and ranges are those of vLLM and TensorRT-LLM."""

    max_tokens: int = 16
    min_tokens: int = 0  # nothing stops the answer, and no token that would is sampled, before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # uint64; the random numbers are a function of (seed, position) alone
    ignore_eos: bool = False  # of the model's end-of-sequence tokens; those of the client stop it all the same
    stop_token_ids: tuple[int, ...] = ()  # the end tokens of the client itself
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of which the last is not sampled after the others
    logit_bias: dict[int, float] = {}  # token id |-> what is added to its logit
    num_logprobs: int | None = None  # of the likeliest tokens, beside the sampled one's; None: of no token


class TokenLogProbs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, by the model alone: before penalties, masks, bias and temperature."""

    log_prob: float  # of the sampled token
    rank: int  # of the sampled token, from 1
    top_token_ids: list[int]  # the likeliest, as many as were asked for
    top_log_probs: list[float]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation request after validation and tokenisation."""

    request_id: int  # unique in the scheduler's life; not the client's id
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0  # class; a smaller one is more urgent
    itl_target_s: float | None = None  # between two tokens; None: the deployment's
    keeps_gaps: bool = False  # that target is of each gap, not of their mean, as TPOT's is
    resumed_token_ids: list[
        int
    ] = []  # outputs of earlier attempts, which were lost with their replica: prefilled again

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def prefill_len(self) -> int:
        """Tokens to prefill: the prompt, and what was generated before this attempt."""
        return self.prompt_len + len(self.resumed_token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Tokens of the sequence when it has run to its limit."""
        return self.prompt_len + self.sampling.max_tokens

    @property
    def max_num_kv_tokens(self) -> int:
        """Tokens whose keys and values are ever stored: the last output token's are not."""
        return self.max_num_tokens - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """The running state of a request in one engine."""

    request: Request
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose KV is in this engine's pool
    block_ids: list[int] = field(default_factory=list)  # block_ids[i] |-> block of tokens [i*B, (i+1)*B)
    finish_reason: FinishReason | None = None
    last_log_probs: TokenLogProbs | None = None  # of the last output token, if they were asked for; set by the engine

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        """The sequence of a request that has yet to be prefilled, without blocks."""
        return cls(request, output_token_ids=list(request.resumed_token_ids))

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len

    @property
    def num_tokens(self) -> int:
        return self.request.prompt_len + len(self.output_token_ids)

    @property
    def num_left_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return self.sampling.max_tokens - len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def last_token_id(self) -> int:
        if self.output_token_ids:
            return self.output_token_ids[-1]
        return self.request.prompt_token_ids[-1]

    def token_ids(self, start: int, length: int) -> list[int]:
        """Token ids of positions [start, start + length), prompt and output seen as one list."""
        prompt = self.request.prompt_token_ids
        end = start + length
        if end <= len(prompt):
            return prompt[start:end]
        return (prompt + self.output_token_ids)[start:end]

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Commits a sampled token and returns the reason if it ends the sequence: "stop" goes before "length"."""
        self.output_token_ids.append(token_id)
        num_output, sampling = len(self.output_token_ids), self.sampling
        if num_output < sampling.min_tokens:
            return None
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
            self.finish_reason = "stop"
        elif num_output >= sampling.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason
