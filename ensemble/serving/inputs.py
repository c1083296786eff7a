"""From what a client sent to a validated `Request`: defaults and ranges of the contract, and what bad input gets."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import InvalidRequest
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.placement import smallest
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints
from ensemble.serving.fields import Tensors, Values, collect, from_tensor
from ensemble.tokenizer import Tokenizer

MAX_STOP_WORDS, MAX_STOP_CHARS = 64, 1024
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIASES = 1024
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below it logits divided by the temperature overflow; the draw is the greedy token by far
MAX_FACTOR = 1e6  # of logits, which are float32 at least
MAX_PRIORITY = 100
MAX_TENANT_LEN = 256
UINT64 = 1 << 64
MAX_ID_LEN = 256  # of a request's id, which every response carries
MAX_PARAMETERS_LEN = 64 << 10  # of a request's parameters as JSON
MAX_JSON_ESCAPE = 6  # bytes of JSON for one of text
MAX_JSON_BYTES = 64 << 10  # of messages, beside their text


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
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: frozenset[int]
    max_token_bytes: int  # of text

    @classmethod
    def of(cls, deployment: Deployment, tokenizer: Tokenizer) -> "ModelLimits":
        spec = load_model_spec(deployment.model.path)
        max_model_len = deployment.model.limit_model_len(spec.max_model_len)
        return cls(spec.vocab_size, max_model_len, spec.eos_token_ids, tokenizer.max_token_bytes)

    @property
    def max_text_bytes(self) -> int:
        """No text that is longer has so few tokens that it fits."""
        return self.max_model_len * self.max_token_bytes


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


def parse_request(
    tensors: Tensors,
    parameters: Mapping[str, Any],  # the client's own, see fields.py
    request_id: int,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    limits: ModelLimits,
) -> ClientRequest:
    """Validates what came with one request. Raises InvalidRequest."""
    check_sizes(tensors, limits)
    values = collect(tensors, parameters)
    options = parse_options(values)
    sampling = parse_sampling(values, options, tokenizer, limits)
    field = next((name for name in ("messages", "text_input") if name in values), "input_ids")
    if "input_ids" in values:  # from a client, or from `preprocess`, beside the text that they were made of
        is_alone = field == "input_ids" or "ensemble_mark" in values
        _check(field, "given beside input_ids", is_alone, "one of the two")
        token_ids = values["input_ids"]
        text = values.get("text_input")
    else:
        token_ids, text = prompt_of(values, tokenizer, chat, limits)
    _check_prompt(field, token_ids, sampling.max_tokens, limits)
    hints = parse_hints(values)
    targets = Targets(
        hints.ttft_target_s, parse_milliseconds(values, "tpot_target_ms"), parse_milliseconds(values, "itl_target_ms")
    )
    request = Request(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=sampling,
        priority=hints.priority,
        itl_target_s=smallest([targets.itl_s, targets.tpot_s], None),
    )
    return ClientRequest(
        request,
        options,
        text,
        parse_stop_words(values),
        hints,
        parse_milliseconds(values, "timeout_ms"),
        targets,
        parse_num_choices(values),
    )


def check_envelope(request_id: str, parameters: str) -> None:
    """What comes with the tensors. Raises InvalidRequest."""
    _check("id", request_id, len(request_id) <= MAX_ID_LEN, f"at most {MAX_ID_LEN} characters")
    allowed = f"at most {MAX_PARAMETERS_LEN} characters as JSON"
    _check("length of parameters", len(parameters), len(parameters) <= MAX_PARAMETERS_LEN, allowed)


def check_sizes(tensors: Tensors, limits: ModelLimits) -> None:
    """Before anything reads them: a prompt that cannot fit is refused by its length. Raises InvalidRequest."""
    if "input_ids" in tensors:
        _check_num_tokens("input_ids", tensors["input_ids"].size, limits)
    if "messages" in tensors:
        _check_num_bytes("messages", tensors["messages"], MAX_JSON_ESCAPE * limits.max_text_bytes + MAX_JSON_BYTES)
    if "text_input" in tensors:
        for raw in tensors["text_input"].reshape(-1)[:1]:
            _check_text("text_input", raw, limits)


def parse_prompt(
    tensors: Tensors, tokenizer: Tokenizer, chat: ChatTemplate, limits: ModelLimits
) -> tuple[list[int], str]:
    """Token ids and text of the prompt that the tensors text_input or messages give. Raises InvalidRequest."""
    check_sizes(tensors, limits)
    return prompt_of({name: from_tensor(name, tensor) for name, tensor in tensors.items()}, tokenizer, chat, limits)


def prompt_of(values: Values, tokenizer: Tokenizer, chat: ChatTemplate, limits: ModelLimits) -> tuple[list[int], str]:
    """Token ids and text of the prompt. Raises InvalidRequest.

    text_input is continued as it is, after the special tokens that start the model's texts; a chat template writes
    all special tokens itself. A text that cannot fit is not tokenized: it is refused by its length.
    """
    if "messages" in values and "text_input" in values:
        raise InvalidRequest("messages", "given beside text_input", "one of the two")
    for name in ("messages", "text_input"):
        _check(name, values.get(name), values.get(name) != "", "at least one character")
    if "messages" in values:
        text = chat.render(values["messages"])
        _check_text("messages in the chat template", text.encode(), limits)
        return tokenizer.encode(text, add_special_tokens=False), text
    if "text_input" not in values:
        raise InvalidRequest("text_input", None, "give text_input, messages or input_ids")
    text = values["text_input"]
    return tokenizer.encode(text), text


def parse_options(values: Values) -> OutputOptions:
    """Raises InvalidRequest."""
    options = OutputOptions(**{name: values[name] for name in OutputOptions.__slots__ if name in values})
    if "echo" in values:
        excludes = values.get("exclude_input_in_output", not values["echo"])
        _check("echo", values["echo"], excludes != values["echo"], "not beside the same exclude_input_in_output")
        options = replace(options, exclude_input_in_output=not values["echo"])
    elif options.return_vllm_outputs and "exclude_input_in_output" not in values:
        options = replace(options, exclude_input_in_output=options.stream)
    if options.return_vllm_outputs and options.stream:
        _check("exclude_input_in_output", False, options.exclude_input_in_output, "true where stream is true")
    if "logprobs" in values and "return_logprobs" not in values:
        options = replace(options, return_logprobs=True)
    return options


def parse_stop_words(values: Values) -> tuple[str, ...]:
    """The stop strings. Raises InvalidRequest for more than MAX_STOP_WORDS, or MAX_STOP_CHARS in one."""
    return _words(values, "stop_words")


def parse_num_choices(values: Values) -> int:
    """Raises InvalidRequest."""
    num_choices: int = values.get("n", 1)
    _check("n", num_choices, 1 <= num_choices <= MAX_CHOICES, f"from 1 to {MAX_CHOICES}")
    best_of = values.get("best_of", num_choices)
    _check("best_of", best_of, best_of == num_choices, f"only n ({num_choices}) is served")
    return num_choices


def parse_hints(values: Values) -> Hints:
    """What the queue's policy may know of the request. Raises InvalidRequest."""
    priority = values.get("priority", 0)
    _check("priority", priority, -MAX_PRIORITY <= priority <= MAX_PRIORITY, f"from {-MAX_PRIORITY} to {MAX_PRIORITY}")
    tenant = values.get("tenant", "")
    _check("tenant", tenant, tenant != "" or "tenant" not in values, "at least one character")
    _check("tenant", tenant, len(tenant) <= MAX_TENANT_LEN, f"at most {MAX_TENANT_LEN} characters")
    return Hints(priority, tenant, parse_milliseconds(values, "ttft_target_ms"))


def parse_milliseconds(values: Values, name: str) -> float | None:
    """That value's time in seconds; None if it is not given. Raises InvalidRequest."""
    if name not in values:
        return None
    milliseconds: float = values[name]
    _check(name, milliseconds, 0 < milliseconds < math.inf, "a number above 0")
    return milliseconds / 1e3


def parse_sampling(values: Values, options: OutputOptions, tokenizer: Tokenizer, limits: ModelLimits) -> SamplingParams:
    """Raises InvalidRequest."""
    names = ("max_tokens", "min_tokens", "top_p", "min_p", "temperature", "ignore_eos", "seed", "top_k")
    plain = {name: values[name] for name in names if name in values}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if name in values:
            plain[name] = values[name]
    if plain.get("seed", -1) == -1:
        plain["seed"] = secrets.randbits(64)
    _check("seed", plain["seed"], -(UINT64 >> 1) <= plain["seed"] < UINT64, "an integer of 64 bits")
    plain["seed"] %= UINT64
    if 0 < plain.get("temperature", 1.0) < MIN_TEMPERATURE:
        plain["temperature"] = 0.0
    if plain.get("top_k") == -1:
        plain["top_k"] = 0
    if plain.get("top_p") == 0:  # TensorRT-LLM's clients: off beside top_k, else the likeliest token alone, as OpenAI's
        plain |= {"top_p": 1.0, "top_k": plain.get("top_k") or 1}
    sampling = SamplingParams(**plain)
    _check("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1")
    _check(
        "min_tokens",
        sampling.min_tokens,
        0 <= sampling.min_tokens <= sampling.max_tokens,
        f"from 0 to max_tokens ({sampling.max_tokens})",
    )
    _check("temperature", sampling.temperature, sampling.temperature >= 0, "a number of at least 0")
    _check("temperature", sampling.temperature, sampling.temperature <= MAX_FACTOR, f"at most {MAX_FACTOR:g}")
    _check("top_k", sampling.top_k, 0 <= sampling.top_k < 1 << 31, "at least 1, or 0 or -1 for all tokens")
    _check("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "from 0 to 1")
    _check("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 to 1")
    _check(
        "repetition_penalty",
        sampling.repetition_penalty,
        0 < sampling.repetition_penalty <= MAX_FACTOR,
        f"above 0 and at most {MAX_FACTOR:g}",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        _check(name, value, -2 <= value <= 2, "from -2 to 2")
    if not math.isfinite(values.get("length_penalty", 1.0)):
        raise InvalidRequest("length_penalty", values["length_penalty"], "a finite number")
    return msgspec.structs.replace(
        sampling,
        **_end_tokens(values, sampling.ignore_eos, limits),
        bad_words=_bad_words(values, tokenizer),
        logit_bias=_logit_bias(values, tokenizer, limits),
        num_logprobs=_num_logprobs(values, options),
    )


def _end_tokens(values: Values, ignores_eos: bool, limits: ModelLimits) -> dict[str, Any]:
    """`end_id` takes the place of the model's own end tokens, unless it is one of them; -1: nothing does."""
    stop_token_ids: list[int] = values.get("stop_token_ids", [])
    _check("stop_token_ids", f"{len(stop_token_ids)} ids", len(stop_token_ids) <= MAX_STOP_TOKENS, "at most 128")
    end_id = values.get("end_id")
    for name, token_id in [("stop_token_ids", each) for each in stop_token_ids] + [("end_id", end_id)]:
        is_valid = token_id is None or 0 <= token_id < limits.vocab_size or (name == "end_id" and token_id == -1)
        _check(name, token_id, is_valid, f"token ids from 0 to {limits.vocab_size - 1}")
    if end_id is not None and end_id not in limits.eos_token_ids:
        ignores_eos = True
        stop_token_ids = stop_token_ids + [end_id] * (end_id >= 0)
    return {"ignore_eos": ignores_eos, "stop_token_ids": tuple(stop_token_ids)}


def _bad_words(values: Values, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, at the start of a text and after a space."""
    texts = [text for word in _words(values, "bad_words") for text in (word, f" {word.lstrip()}")]
    found = {tuple(tokenizer.encode(text, add_special_tokens=False)): None for text in texts}
    return tuple(token_ids for token_ids in found if token_ids)


def _logit_bias(values: Values, tokenizer: Tokenizer, limits: ModelLimits) -> dict[int, float]:
    """What logit_bias (by token id) and embedding_bias_words (by text) add to the logits."""
    given: dict[Any, Any] = values.get("logit_bias", {})
    words, weights = values.get("embedding_bias_words", []), values.get("embedding_bias_weights", [])
    _check("embedding_bias_weights", weights, len(words) == len(weights), f"one for each of {len(words)} words")
    bias: dict[int, float] = {}
    for key, value in given.items():
        is_id = str(key).isdecimal() and int(key) < limits.vocab_size
        _check("logit_bias", key, is_id, f"token ids from 0 to {limits.vocab_size - 1}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _check(f"logit_bias[{key}]", value, is_number and -100 <= value <= 100, "a number from -100 to 100")
        bias[int(key)] = float(value)
    for word, weight in zip(words, weights, strict=True):
        _check("embedding_bias_weights", weight, abs(weight) <= MAX_FACTOR, f"at most {MAX_FACTOR:g}")
        for token_id in tokenizer.encode(word, add_special_tokens=False):
            bias[token_id] = bias.get(token_id, 0.0) + weight
    _check("logit_bias", f"{len(bias)} tokens", len(bias) <= MAX_LOGIT_BIASES, f"at most {MAX_LOGIT_BIASES}")
    return bias


def _num_logprobs(values: Values, options: OutputOptions) -> int | None:
    asked = options.return_log_probs or options.return_logprobs or options.return_cumulative_logprob
    num_logprobs: int | None = values.get("logprobs", 0 if asked else None)
    is_valid = num_logprobs is None or 0 <= num_logprobs <= MAX_LOGPROBS
    _check("logprobs", num_logprobs, is_valid, f"from 0 to {MAX_LOGPROBS}")
    return num_logprobs if asked else None


def _words(values: Values, name: str) -> tuple[str, ...]:
    words: list[str] = values.get(name, [])
    _check(name, f"{len(words)} strings", len(words) <= MAX_STOP_WORDS, f"at most {MAX_STOP_WORDS}")
    for index, word in enumerate(words):
        _check(f"{name}[{index}]", word, len(word) <= MAX_STOP_CHARS, f"at most {MAX_STOP_CHARS} characters")
    return tuple(words)


def _check_text(field: str, text: bytes, limits: ModelLimits) -> None:
    allowed = f"at most {limits.max_text_bytes} bytes, {limits.max_model_len} tokens (max_model_len)"
    allowed += f" of at most {limits.max_token_bytes} bytes"
    _check(f"length of {field}", f"{len(text)} bytes", len(text) <= limits.max_text_bytes, allowed)


def _check_num_bytes(field: str, tensor: npt.NDArray[Any], limit: int) -> None:
    num_bytes = sum(len(raw) for raw in tensor.reshape(-1))
    _check(f"length of {field}", f"{num_bytes} bytes", num_bytes <= limit, f"at most {limit} bytes")


def _check_num_tokens(field: str, num_tokens: int, limits: ModelLimits) -> None:
    _check(
        f"length of {field}",
        num_tokens,
        num_tokens < limits.max_model_len,
        f"at most {limits.max_model_len - 1} tokens, one less than max_model_len",
    )


def _check_prompt(field: str, token_ids: list[int], max_tokens: int, limits: ModelLimits) -> None:
    _check(field, token_ids, len(token_ids) > 0, "at least one token")
    for token_id in (min(token_ids), max(token_ids)):
        _check(field, token_id, 0 <= token_id < limits.vocab_size, f"token ids from 0 to {limits.vocab_size - 1}")
    _check_num_tokens(field, len(token_ids), limits)
    _check(
        "max_tokens",
        max_tokens,
        len(token_ids) + max_tokens <= limits.max_model_len,
        f"at most {limits.max_model_len - len(token_ids)} after a prompt of {len(token_ids)} tokens"
        f" (max_model_len {limits.max_model_len})",
    )


def _check(field: str, value: Any, is_valid: bool, allowed: str) -> None:
    if not is_valid:  # comparisons with NaN are false, so NaN is never valid
        raise InvalidRequest(field, value, allowed)
