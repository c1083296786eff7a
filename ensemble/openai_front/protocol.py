"""The requests of OpenAI's API: their members, and what becomes of each.

A member that is null counts as not given. One that OpenAI's API does not have is refused by name, and so is one whose
effect is not served; those that have none on an answer are taken.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from ensemble.errors import InvalidRequest
from ensemble.openai_front.errors import ApiError, invalid_body

MAX_LOGPROBS = 20  # OpenAI's limit, and the scheduler's
MAX_PROMPTS = 64  # in one request for completions
MIN_TOP_P = 1e-6  # OpenAI's API takes 0 as well: the likeliest token alone
# Taken at any value: none changes what is answered.
WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
}
SAMPLING = (
    "seed",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
)
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
AskedModel = TypeVar("AskedModel", bound="Asked")


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One of text or of token ids, or a list of such."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of one of these")
    are_texts = all(isinstance(each, str) for each in value)
    if not are_texts and not all(isinstance(each, list) and all(map(_may_be_token, each)) for each in value):
        raise ValueError("strings, or lists of token ids")
    return value


def _may_be_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise ValueError("a string or a list of strings")
    return texts


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none


class Asked(BaseModel):
    """What both endpoints have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    # name |-> the values at which it has no effect
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[str], PlainValidator(_stop)] = []
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # not OpenAI's: the scheduler's own
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = Field(None, ge=-100, le=100)
    timeout_ms: float | None = None
    ttft_target_ms: float | None = None
    itl_target_ms: float | None = None
    tpot_target_ms: float | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Of the likeliest tokens at each position, beside the sampled one; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        return False

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> dict[str, Any]:
        """The scheduler's `sampling_parameters`."""
        found = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.top_p is not None:
            found["top_p"] = max(self.top_p, MIN_TOP_P)
        if self.stop:
            found["stop_words"] = self.stop
        if self.num_logprobs is not None:
            found["logprobs"] = self.num_logprobs
        return found | {"max_tokens": max_tokens, "n": self.n}

    def options(self) -> dict[str, Any]:
        """The scheduler's other inputs. A user's share is fair among users, under the policy `fair`."""
        names = ("priority", "timeout_ms", "ttft_target_ms", "itl_target_ms", "tpot_target_ms")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.user:
            found["tenant"] = self.user
        return found | {"stream": self.stream, "echo": self.echoes}


class CompletionRequest(Asked):
    unserved = {"suffix": ("",)}

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return self.echo


class ChatRequest(Asked):
    unserved = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Any]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's: what the model's template may know

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(body: bytes, kind: type[AskedModel]) -> AskedModel:
    """Raises ApiError."""
    try:
        values = json.loads(body)
        if _ESCAPED_SURROGATE.search(body):
            json.dumps(values, ensure_ascii=False).encode()  # raises for one without its other half, which is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "The request's body is not JSON.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The request's body is not a JSON object.", code="invalid_json")
    values = {name: value for name, value in values.items() if value is not None and name not in WITHOUT_EFFECT}
    if values.get("tool_choice") == "none":  # nor does the model see them: it could do nothing with them
        values = {name: value for name, value in values.items() if name not in ("tools", "functions")}
    for name, neutral in kind.unserved.items():
        if name in values and values.pop(name) not in neutral:
            message = f"Unsupported parameter: '{name}' is not served."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    try:
        asked = kind.model_validate(values)
    except ValidationError as error:
        raise invalid_body(error) from None
    _check_combinations(asked)
    return asked


def _check_combinations(asked: Asked) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise _refused("stream_options", "given", "only where stream is true")
    if isinstance(asked, CompletionRequest):
        if asked.echo and asked.logprobs is not None:
            raise _refused("echo", True, "false where logprobs is given: those of a prompt are not computed")
        if asked.best_of not in (None, asked.n):
            raise _refused("best_of", asked.best_of, f"only n ({asked.n}) is served")
    if isinstance(asked, ChatRequest):
        if asked.top_logprobs is not None and not asked.logprobs:
            raise _refused("top_logprobs", asked.top_logprobs, "only where logprobs is true")
        if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
            raise _refused("max_tokens", asked.max_tokens, "not beside another max_completion_tokens")


def _refused(param: str, value: Any, allowed: str) -> ApiError:
    text = str(InvalidRequest(param, value, allowed))
    return ApiError(400, text, param=param, code="invalid_value")
