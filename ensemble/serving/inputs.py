"""From what a client sent to a validated `Request`: defaults and ranges of the contract, and what bad input gets."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ensemble.chat import ChatTemplate
from ensemble.errors import InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.placement import smallest
from ensemble.scheduling.policies import Hints
from ensemble.serving.client_request import ClientRequest, OutputOptions, Targets
from ensemble.serving.fields import Tensors, Values, collect, from_tensor
from ensemble.serving.limits import ModelLimits, check, check_num_bytes, check_num_tokens, check_text
from ensemble.serving.sampling_inputs import parse_sampling, parse_words
from ensemble.tokenizer import Tokenizer

MAX_CHOICES = 16
MAX_PRIORITY = 100
MAX_TENANT_LEN = 256
MAX_ID_LEN = 256  # of a request's id, which every response carries
MAX_PARAMETERS_LEN = 64 << 10  # of a request's parameters as JSON
MAX_JSON_ESCAPE = 6  # bytes of JSON for one of text
MAX_JSON_BYTES = 64 << 10  # of messages, beside their text


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
        check(field, "given beside input_ids", is_alone, "one of the two")
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
        keeps_gaps=targets.itl_s is not None,
    )
    return ClientRequest(
        request,
        options,
        text,
        parse_words(values, "stop_words"),
        hints,
        parse_milliseconds(values, "timeout_ms"),
        targets,
        parse_num_choices(values),
    )


def check_envelope(request_id: str, parameters: str) -> None:
    """What comes with the tensors. Raises InvalidRequest."""
    check("id", request_id, len(request_id) <= MAX_ID_LEN, f"at most {MAX_ID_LEN} characters")
    allowed = f"at most {MAX_PARAMETERS_LEN} characters as JSON"
    check("length of parameters", len(parameters), len(parameters) <= MAX_PARAMETERS_LEN, allowed)


def check_sizes(tensors: Tensors, limits: ModelLimits) -> None:
    """Before anything reads them: a prompt that cannot fit is refused by its length. Raises InvalidRequest."""
    if "input_ids" in tensors:
        check_num_tokens("input_ids", tensors["input_ids"].size, limits)
    if "messages" in tensors:
        check_num_bytes("messages", tensors["messages"], MAX_JSON_ESCAPE * limits.max_text_bytes + MAX_JSON_BYTES)
    if "text_input" in tensors:
        for raw in tensors["text_input"].reshape(-1)[:1]:
            check_text("text_input", raw, limits)


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
        check(name, values.get(name), values.get(name) != "", "at least one character")
    if "messages" in values:
        text = chat.render(values["messages"])
        check_text("messages in the chat template", text.encode(), limits)
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
        check("echo", values["echo"], excludes != values["echo"], "not beside the same exclude_input_in_output")
        options = replace(options, exclude_input_in_output=not values["echo"])
    elif options.return_vllm_outputs and "exclude_input_in_output" not in values:
        options = replace(options, exclude_input_in_output=options.stream)
    if options.return_vllm_outputs and options.stream:
        check("exclude_input_in_output", False, options.exclude_input_in_output, "true where stream is true")
    if "logprobs" in values and "return_logprobs" not in values:
        options = replace(options, return_logprobs=True)
    return options


def parse_num_choices(values: Values) -> int:
    """Raises InvalidRequest."""
    num_choices: int = values.get("n", 1)
    check("n", num_choices, 1 <= num_choices <= MAX_CHOICES, f"from 1 to {MAX_CHOICES}")
    best_of = values.get("best_of", num_choices)
    check("best_of", best_of, best_of == num_choices, f"only n ({num_choices}) is served")
    return num_choices


def parse_hints(values: Values) -> Hints:
    """What the queue's policy may know of the request. Raises InvalidRequest."""
    priority = values.get("priority", 0)
    check("priority", priority, -MAX_PRIORITY <= priority <= MAX_PRIORITY, f"from {-MAX_PRIORITY} to {MAX_PRIORITY}")
    tenant = values.get("tenant", "")
    check("tenant", tenant, tenant != "" or "tenant" not in values, "at least one character")
    check("tenant", tenant, len(tenant) <= MAX_TENANT_LEN, f"at most {MAX_TENANT_LEN} characters")
    return Hints(priority, tenant, parse_milliseconds(values, "ttft_target_ms"))


def parse_milliseconds(values: Values, name: str) -> float | None:
    """That value's time in seconds; None if it is not given. Raises InvalidRequest."""
    if name not in values:
        return None
    milliseconds: float = values[name]
    check(name, milliseconds, 0 < milliseconds < math.inf, "a number above 0")
    return milliseconds / 1e3


def _check_prompt(field: str, token_ids: list[int], max_tokens: int, limits: ModelLimits) -> None:
    check(field, token_ids, len(token_ids) > 0, "at least one token")
    for token_id in (min(token_ids), max(token_ids)):
        check(field, token_id, 0 <= token_id < limits.vocab_size, f"token ids from 0 to {limits.vocab_size - 1}")
    check_num_tokens(field, len(token_ids), limits)
    check(
        "max_tokens",
        max_tokens,
        len(token_ids) + max_tokens <= limits.max_model_len,
        f"at most {limits.max_model_len - len(token_ids)} after a prompt of {len(token_ids)} tokens"
        f" (max_model_len {limits.max_model_len})",
    )
