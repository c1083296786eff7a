"""A request as the scheduler queues it: what is computed, and what only its answer needs."""

from dataclasses import dataclass, replace

import msgspec

from ensemble.request import Request
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints

UINT64 = 1 << 64


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a client wants to see of the answer."""

    stream: bool = False
    exclude_input_in_output: bool = True
    include_stop_str_in_output: bool = False  # also the text of a token that ends the answer
    return_finish_reason: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_output_ids: bool = False
    return_perf_metrics: bool = False
    return_log_probs: bool = False  # output_log_probs and cum_log_probs
    return_logprobs: bool = False  # logprobs
    return_cumulative_logprob: bool = False
    return_vllm_outputs: bool = False  # the request came by `vllm_model`


@dataclass(frozen=True, slots=True)
class Targets:
    """The service level that the client asks for; None: it does not say."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None

    def __bool__(self) -> bool:
        return self != NO_TARGETS


NO_TARGETS = Targets()


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request as the scheduler queues it, with what only its answer needs."""

    request: Request
    options: OutputOptions
    prompt_text: str | None  # None when the client sent token ids alone
    stop_strings: tuple[str, ...] = ()
    hints: Hints = DEFAULT_HINTS
    timeout_s: float | None = None  # from arrival
    targets: Targets = NO_TARGETS
    num_choices: int = 1  # answers that the client wants
    choice: int = 0  # which of them this is

    def nth_choice(self, choice: int, request_id: int) -> "ClientRequest":
        """The same for another answer. Its seed follows from the first one's, so that all can be had again."""
        seed = choice_seed(self.request.sampling.seed, choice)
        sampling = msgspec.structs.replace(self.request.sampling, seed=seed)
        request = msgspec.structs.replace(self.request, request_id=request_id, sampling=sampling)
        return replace(self, request=request, choice=choice)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a choice: the request's own for the first, for others one mixed from both (splitmix64)."""
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) % UINT64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % UINT64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % UINT64
    return mixed ^ (mixed >> 31)
