"""How tokens are drawn, and when an answer ends: ranges and defaults of the contract."""

import math
import secrets
from typing import Any

import msgspec

from ensemble.errors import InvalidRequest
from ensemble.request import SamplingParams
from ensemble.serving.client_request import UINT64, OutputOptions
from ensemble.serving.fields import Values
from ensemble.serving.limits import ModelLimits, check
from ensemble.tokenizer import Tokenizer

MAX_STOP_WORDS, MAX_STOP_CHARS = 64, 1024
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below it logits divided by the temperature overflow; the draw is the greedy token by far
MAX_FACTOR = 1e6  # of logits, which are float32 at least


def parse_sampling(values: Values, options: OutputOptions, tokenizer: Tokenizer, limits: ModelLimits) -> SamplingParams:
    """Raises InvalidRequest."""
    names = ("max_tokens", "min_tokens", "top_p", "min_p", "temperature", "ignore_eos", "seed", "top_k")
    plain = {name: values[name] for name in names if name in values}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if name in values:
            plain[name] = values[name]
    if plain.get("seed", -1) == -1:
        plain["seed"] = secrets.randbits(64)
    check("seed", plain["seed"], -(UINT64 >> 1) <= plain["seed"] < UINT64, "an integer of 64 bits")
    plain["seed"] %= UINT64
    if 0 < plain.get("temperature", 1.0) < MIN_TEMPERATURE:
        plain["temperature"] = 0.0
    if plain.get("top_k") == -1:
        plain["top_k"] = 0
    if plain.get("top_p") == 0:  # TensorRT-LLM's clients: off beside top_k, else the likeliest token alone, as OpenAI's
        plain |= {"top_p": 1.0, "top_k": plain.get("top_k") or 1}
    sampling = SamplingParams(**plain)
    check("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1")
    check(
        "min_tokens",
        sampling.min_tokens,
        0 <= sampling.min_tokens <= sampling.max_tokens,
        f"from 0 to max_tokens ({sampling.max_tokens})",
    )
    check("temperature", sampling.temperature, sampling.temperature >= 0, "a number of at least 0")
    check("temperature", sampling.temperature, sampling.temperature <= MAX_FACTOR, f"at most {MAX_FACTOR:g}")
    check("top_k", sampling.top_k, 0 <= sampling.top_k < 1 << 31, "at least 1, or 0 or -1 for all tokens")
    check("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "from 0 to 1")
    check("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 to 1")
    check(
        "repetition_penalty",
        sampling.repetition_penalty,
        0 < sampling.repetition_penalty <= MAX_FACTOR,
        f"above 0 and at most {MAX_FACTOR:g}",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        check(name, value, -2 <= value <= 2, "from -2 to 2")
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
    check("stop_token_ids", f"{len(stop_token_ids)} ids", len(stop_token_ids) <= MAX_STOP_TOKENS, "at most 128")
    end_id = values.get("end_id")
    for name, token_id in [("stop_token_ids", each) for each in stop_token_ids] + [("end_id", end_id)]:
        is_valid = token_id is None or 0 <= token_id < limits.vocab_size or (name == "end_id" and token_id == -1)
        check(name, token_id, is_valid, f"token ids from 0 to {limits.vocab_size - 1}")
    if end_id is not None and end_id not in limits.eos_token_ids:
        ignores_eos = True
        stop_token_ids = stop_token_ids + [end_id] * (end_id >= 0)
    return {"ignore_eos": ignores_eos, "stop_token_ids": tuple(stop_token_ids)}


def _bad_words(values: Values, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, at the start of a text and after a space."""
    texts = [text for word in parse_words(values, "bad_words") for text in (word, f" {word.lstrip()}")]
    found = {tuple(tokenizer.encode(text, add_special_tokens=False)): None for text in texts}
    return tuple(token_ids for token_ids in found if token_ids)


def _logit_bias(values: Values, tokenizer: Tokenizer, limits: ModelLimits) -> dict[int, float]:
    """What logit_bias (by token id) and embedding_bias_words (by text) add to the logits."""
    given: dict[Any, Any] = values.get("logit_bias", {})
    words, weights = values.get("embedding_bias_words", []), values.get("embedding_bias_weights", [])
    check("embedding_bias_weights", weights, len(words) == len(weights), f"one for each of {len(words)} words")
    bias: dict[int, float] = {}
    for key, value in given.items():
        is_id = str(key).isdecimal() and int(key) < limits.vocab_size
        check("logit_bias", key, is_id, f"token ids from 0 to {limits.vocab_size - 1}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        check(f"logit_bias[{key}]", value, is_number and -100 <= value <= 100, "a number from -100 to 100")
        bias[int(key)] = float(value)
    for word, weight in zip(words, weights, strict=True):
        check("embedding_bias_weights", weight, abs(weight) <= MAX_FACTOR, f"at most {MAX_FACTOR:g}")
        for token_id in tokenizer.encode(word, add_special_tokens=False):
            bias[token_id] = bias.get(token_id, 0.0) + weight
    check("logit_bias", f"{len(bias)} tokens", len(bias) <= MAX_LOGIT_BIASES, f"at most {MAX_LOGIT_BIASES}")
    return bias


def _num_logprobs(values: Values, options: OutputOptions) -> int | None:
    asked = options.return_log_probs or options.return_logprobs or options.return_cumulative_logprob
    num_logprobs: int | None = values.get("logprobs", 0 if asked else None)
    is_valid = num_logprobs is None or 0 <= num_logprobs <= MAX_LOGPROBS
    check("logprobs", num_logprobs, is_valid, f"from 0 to {MAX_LOGPROBS}")
    return num_logprobs if asked else None


def parse_words(values: Values, name: str) -> tuple[str, ...]:
    """Strings of that value. Raises InvalidRequest for more than MAX_STOP_WORDS, or MAX_STOP_CHARS in one."""
    words: list[str] = values.get(name, [])
    check(name, f"{len(words)} strings", len(words) <= MAX_STOP_WORDS, f"at most {MAX_STOP_WORDS}")
    for index, word in enumerate(words):
        check(f"{name}[{index}]", word, len(word) <= MAX_STOP_CHARS, f"at most {MAX_STOP_CHARS} characters")
    return tuple(words)
