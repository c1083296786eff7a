"""From a client's tensors to a validated `Request`: names and defaults of the contract, and what bad input gets."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import InvalidRequest
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints
from ensemble.tokenizer import Tokenizer

MAX_STOP_WORDS, MAX_STOP_CHARS = 64, 1024
MIN_TEMPERATURE = 1e-5  # below it logits divided by the temperature overflow; the draw is the greedy token by far
MAX_PRIORITY = 100
MAX_TENANT_LEN = 256
MAX_ID_LEN = 256  # of a request's id, which every response carries
MAX_PARAMETERS_LEN = 64 << 10  # of a request's parameters as JSON
MAX_JSON_ESCAPE = 6  # bytes of JSON for one of text
MAX_JSON_BYTES = 64 << 10  # of messages, beside their text
Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a client wants to see of the answer."""

    stream: bool = False
    exclude_input_in_output: bool = True
    return_finish_reason: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_output_ids: bool = False
    return_perf_metrics: bool = False


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    max_token_bytes: int  # of text

    @classmethod
    def of(cls, deployment: Deployment, tokenizer: Tokenizer) -> "ModelLimits":
        spec = load_model_spec(deployment.model.path)
        max_model_len = deployment.model.limit_model_len(spec.max_model_len)
        return cls(spec.vocab_size, max_model_len, tokenizer.max_token_bytes)

    @property
    def max_text_bytes(self) -> int:
        """No text that is longer has so few tokens that it fits."""
        return self.max_model_len * self.max_token_bytes


@dataclass(frozen=True, slots=True)
class Targets:
    """The service level that the client asks for; None: it does not say."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None


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


def parse_request(
    tensors: Tensors, request_id: int, tokenizer: Tokenizer, chat: ChatTemplate, limits: ModelLimits
) -> ClientRequest:
    """Validates the tensors of one request. Raises InvalidRequest."""
    options = OutputOptions(
        **{name: bool(_scalar(tensors, name)) for name in OutputOptions.__slots__ if name in tensors}
    )
    sampling = parse_sampling(tensors)
    field = next((name for name in ("messages", "text_input") if name in tensors), "input_ids")
    if "input_ids" in tensors:  # from a client, or from `preprocess`, beside the text that they were made of
        _check_num_tokens("input_ids", tensors["input_ids"].size, limits)
        token_ids = [int(token_id) for token_id in tensors["input_ids"].reshape(-1)]
        text = parse_text(tensors["text_input"]) if "text_input" in tensors else None
    else:
        token_ids, text = parse_prompt(tensors, tokenizer, chat, limits)
    _check_prompt(field, token_ids, sampling.max_tokens, limits)
    hints = parse_hints(tensors)
    request = Request(request_id=request_id, prompt_token_ids=token_ids, sampling=sampling, priority=hints.priority)
    timeout_s = parse_milliseconds(tensors, "timeout_ms")
    targets = Targets(hints.ttft_target_s, parse_milliseconds(tensors, "tpot_target_ms"))
    return ClientRequest(request, options, text, parse_stop_words(tensors), hints, timeout_s, targets)


def check_envelope(request_id: str, parameters: str) -> None:
    """What comes with the tensors. Raises InvalidRequest."""
    _check("id", request_id, len(request_id) <= MAX_ID_LEN, f"at most {MAX_ID_LEN} characters")
    allowed = f"at most {MAX_PARAMETERS_LEN} characters as JSON"
    _check("length of parameters", len(parameters), len(parameters) <= MAX_PARAMETERS_LEN, allowed)


def parse_prompt(
    tensors: Tensors, tokenizer: Tokenizer, chat: ChatTemplate, limits: ModelLimits
) -> tuple[list[int], str]:
    """Token ids and text of the prompt that text_input or messages give. Raises InvalidRequest.

    text_input is continued as it is, after the special tokens that start the model's texts; a chat template writes
    all special tokens itself. A text that cannot fit is not tokenized: it is refused by its length.
    """
    if "messages" in tensors and "text_input" in tensors:
        raise InvalidRequest("messages", "given beside text_input", "one of the two")
    if "messages" in tensors:
        _check_num_bytes("messages", tensors["messages"], MAX_JSON_ESCAPE * limits.max_text_bytes + MAX_JSON_BYTES)
        text = chat.render(parse_text(tensors["messages"], "messages"))
        _check_text("messages in the chat template", text.encode(), limits)
        return tokenizer.encode(text, add_special_tokens=False), text
    if "text_input" not in tensors:
        raise InvalidRequest("text_input", None, "give text_input, messages or input_ids")
    for raw in tensors["text_input"].reshape(-1)[:1]:
        _check_text("text_input", raw, limits)
    text = parse_text(tensors["text_input"])
    return tokenizer.encode(text), text


def parse_stop_words(tensors: Tensors) -> tuple[str, ...]:
    """The stop strings. Raises InvalidRequest for an empty one and for more than MAX_STOP_WORDS."""
    if "stop_words" not in tensors:
        return ()
    words = tensors["stop_words"].reshape(-1)
    _check("stop_words", f"{words.size} strings", words.size <= MAX_STOP_WORDS, f"at most {MAX_STOP_WORDS}")
    strings = tuple(parse_text(words[index : index + 1], f"stop_words[{index}]") for index in range(words.size))
    for index, string in enumerate(strings):
        _check(f"stop_words[{index}]", string, len(string) <= MAX_STOP_CHARS, f"at most {MAX_STOP_CHARS} characters")
    return strings


def parse_hints(tensors: Tensors) -> Hints:
    """What the queue's policy may know of the request. Raises InvalidRequest."""
    priority = int(_scalar(tensors, "priority")) if "priority" in tensors else 0
    _check("priority", priority, -MAX_PRIORITY <= priority <= MAX_PRIORITY, f"from {-MAX_PRIORITY} to {MAX_PRIORITY}")
    tenant = parse_text(tensors["tenant"], "tenant") if "tenant" in tensors else ""
    _check("tenant", tenant, len(tenant) <= MAX_TENANT_LEN, f"at most {MAX_TENANT_LEN} characters")
    return Hints(priority, tenant, parse_milliseconds(tensors, "ttft_target_ms"))


def parse_milliseconds(tensors: Tensors, name: str) -> float | None:
    """The tensor's time in seconds; None if it is not given. Raises InvalidRequest."""
    if name not in tensors:
        return None
    milliseconds = float(_scalar(tensors, name))
    _check(name, milliseconds, 0 < milliseconds < math.inf, "a number above 0")
    return milliseconds / 1e3


def parse_text(tensor: npt.NDArray[Any], field: str = "text_input") -> str:
    """The text of a BYTES tensor of one element. Raises InvalidRequest for empty text and invalid UTF-8."""
    raw = tensor.reshape(-1)[0] if tensor.size == 1 else None
    if raw is None:
        raise InvalidRequest(field, f"{tensor.size} elements", "exactly one element")
    try:
        text = raw.decode() if isinstance(raw, bytes) else str(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, raw, f"valid UTF-8 (byte {error.start} is not)") from None
    if not text:
        raise InvalidRequest(field, text, "at least one character")
    return text


def parse_sampling(tensors: Tensors) -> SamplingParams:
    """The sampling parameters among the tensors, aliases resolved. Raises InvalidRequest."""
    values = {name: _scalar(tensors, name) for name in SamplingParams.__struct_fields__ if name in tensors}
    for alias, name in (("min_length", "min_tokens"), ("random_seed", "seed")):
        if alias in tensors and name not in values:
            values[name] = _scalar(tensors, alias)
    values.setdefault("seed", secrets.randbits(64))
    if 0 < values.get("temperature", 1.0) < MIN_TEMPERATURE:
        values["temperature"] = 0.0
    values["top_k"] = max(0, values.get("top_k", 0)) if values.get("top_k", 0) >= -1 else values["top_k"]
    sampling = SamplingParams(**values)
    _check("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1")
    _check(
        "min_tokens",
        sampling.min_tokens,
        0 <= sampling.min_tokens <= sampling.max_tokens,
        f"from 0 to max_tokens ({sampling.max_tokens})",
    )
    _check("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "a number of at least 0")
    _check("top_k", sampling.top_k, sampling.top_k >= 0, "at least 1, or 0 or -1 for all tokens")
    _check("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1")
    _check("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 to 1")
    _check("repetition_penalty", sampling.repetition_penalty, 0 < sampling.repetition_penalty < math.inf, "above 0")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        _check(name, value, -2 <= value <= 2, "from -2 to 2")
    return sampling


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


def _scalar(tensors: Tensors, name: str) -> Any:
    tensor = tensors[name]
    if tensor.size != 1:
        raise InvalidRequest(name, f"{tensor.size} elements", "exactly one element")
    return np.asarray(tensor).reshape(-1)[0].item()


def _check(field: str, value: Any, is_valid: bool, allowed: str) -> None:
    if not is_valid:  # comparisons with NaN are false, so NaN is never valid
        raise InvalidRequest(field, value, allowed)
