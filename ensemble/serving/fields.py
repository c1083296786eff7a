"""The names that clients of TensorRT-LLM's, vLLM's and this server send, and values of them as Python has them.

A value may come as a tensor, as a member of the JSON in `sampling_parameters`, or as a request parameter, which is what
the Triton server makes of members of an HTTP body that are no inputs. The first of the three that has it counts.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemble.errors import InvalidRequest

Tensors = Mapping[str, npt.NDArray[Any]]
Values = dict[str, Any]


class Kind(Enum):
    """What a value is, in the words in which another is refused."""

    INT = "an integer"
    FLOAT = "a number"
    BOOL = "true or false"
    TEXT = "a string"
    TEXTS = "a string or a list of strings"
    INTS = "a list of integers"
    FLOATS = "a list of numbers"
    OBJECT = "a JSON object"


SAMPLING: dict[str, Kind] = {
    "max_tokens": Kind.INT,
    "min_tokens": Kind.INT,
    "temperature": Kind.FLOAT,
    "top_k": Kind.INT,
    "top_p": Kind.FLOAT,
    "min_p": Kind.FLOAT,
    "repetition_penalty": Kind.FLOAT,
    "presence_penalty": Kind.FLOAT,
    "frequency_penalty": Kind.FLOAT,
    "seed": Kind.INT,
    "ignore_eos": Kind.BOOL,
    "include_stop_str_in_output": Kind.BOOL,
    "stop_words": Kind.TEXTS,
    "bad_words": Kind.TEXTS,
    "stop_token_ids": Kind.INTS,
    "logit_bias": Kind.OBJECT,
    "n": Kind.INT,
    "best_of": Kind.INT,
    "logprobs": Kind.INT,
    "end_id": Kind.INT,
}
OTHERS: dict[str, Kind] = {
    "text_input": Kind.TEXT,
    "messages": Kind.TEXT,
    "input_ids": Kind.INTS,
    "sampling_parameters": Kind.OBJECT,
    "embedding_bias_words": Kind.TEXTS,
    "embedding_bias_weights": Kind.FLOATS,
    "stream": Kind.BOOL,
    "priority": Kind.INT,
    "tenant": Kind.TEXT,
    "ttft_target_ms": Kind.FLOAT,
    "itl_target_ms": Kind.FLOAT,
    "tpot_target_ms": Kind.FLOAT,
    "timeout_ms": Kind.FLOAT,
    "exclude_input_in_output": Kind.BOOL,
    "echo": Kind.BOOL,
    "return_finish_reason": Kind.BOOL,
    "return_num_input_tokens": Kind.BOOL,
    "return_num_output_tokens": Kind.BOOL,
    "return_output_ids": Kind.BOOL,
    "return_perf_metrics": Kind.BOOL,
    "return_log_probs": Kind.BOOL,
    "return_logprobs": Kind.BOOL,
    "return_cumulative_logprob": Kind.BOOL,
    "ensemble_mark": Kind.TEXT,
    "return_vllm_outputs": Kind.BOOL,
}
# Of no effect at these values, and refused at others. None: at any, because what it is a detail of is refused.
NEUTRAL: dict[str, tuple[Kind, tuple[Any, ...] | None]] = {
    "beam_width": (Kind.INT, (1,)),
    "use_beam_search": (Kind.BOOL, (False,)),
    "length_penalty": (Kind.FLOAT, None),
    "early_stopping": (Kind.BOOL, (False,)),
    "pad_id": (Kind.INT, None),
    "accumulate_tokens": (Kind.BOOL, (False,)),
    "return_context_logits": (Kind.BOOL, (False,)),
    "return_generation_logits": (Kind.BOOL, (False,)),
    "skip_special_tokens": (Kind.BOOL, (True,)),
    "spaces_between_special_tokens": (Kind.BOOL, (True,)),
    "detokenize": (Kind.BOOL, (True,)),
    "flat_logprobs": (Kind.BOOL, (False,)),
    "embedding_request": (Kind.BOOL, (False,)),
}
NEUTRAL_SAMPLING = {
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "flat_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
}
# vLLM's sampling parameters that are served only by their absence, which is null.
ONLY_NULL = (
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "logits_processors",
    "guided_decoding",
    "structured_outputs",
    "allowed_token_ids",
    "extra_args",
    "repetition_detection",
    "thinking_token_budget",
    "lora_name",
)
ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_length": "min_tokens",
    "random_seed": "seed",
    "stop": "stop_words",
    "num_return_sequences": "n",
}
KINDS: dict[str, Kind] = {
    **SAMPLING,
    **OTHERS,
    **{name: kind for name, (kind, _) in NEUTRAL.items()},
}
KINDS |= {alias: KINDS[name] for alias, name in ALIASES.items()}
IN_SAMPLING_PARAMETERS = {
    *SAMPLING,
    *NEUTRAL_SAMPLING,
    *(alias for alias, name in ALIASES.items() if name in SAMPLING),
}
MAX_NAME_LEN = 64  # of one that may be a misspelling
INTERNAL = {"ensemble_mark", "return_vllm_outputs"}  # between the models, not for clients
SCHEDULER_ONLY = {"input_ids", "return_output_ids"}  # the ensembles have neither this input nor the output
# What the Triton server and its clients put among a request's parameters by themselves.
OF_THE_SERVER = re.compile(r"triton_\w*|sequence_(?:id|start|end)|priority|timeout|headers|binary_data_output|id")


def collect(tensors: Tensors, parameters: Mapping[str, Any]) -> Values:
    """Name |-> value of all that was sent, aliases resolved; what is not there was not sent. Raises InvalidRequest.

    parameters: the request's own, without those of the server and of the relay.
    """
    given = {name: from_tensor(name, tensor) for name, tensor in tensors.items()}
    is_of_ensemble = "ensemble_mark" in tensors
    names = [name for name in KINDS if name not in INTERNAL and not (is_of_ensemble and name in SCHEDULER_ONLY)]
    for name in parameters:
        if name not in names:
            raise unknown(name, parameters[name], names)
    asked = {name: from_json(name, value) for name, value in parameters.items()}
    packed = given.pop("sampling_parameters", None) or asked.pop("sampling_parameters", None) or {}
    for name, value in packed.items():
        if name in ONLY_NULL and value is not None:
            raise InvalidRequest(f"sampling_parameters.{name}", value, "it is not served; leave it out")
        if name not in IN_SAMPLING_PARAMETERS and name not in ONLY_NULL:
            raise unknown(f"sampling_parameters.{name}", value, IN_SAMPLING_PARAMETERS)
    unpacked = {name: from_json(name, value) for name, value in packed.items() if value is not None}
    values: Values = {}
    for layer in (given, unpacked, asked):
        values = _without_aliases(layer) | values
    for name, (_, allowed) in NEUTRAL.items():
        if name in values and allowed is not None and values[name] not in allowed:
            raise InvalidRequest(name, values[name], f"only {str(allowed[0]).lower()} is served")
    return values


def from_tensor(name: str, tensor: npt.NDArray[Any]) -> Any:
    """The value of an input. Raises InvalidRequest."""
    kind, elements = KINDS[name], np.asarray(tensor).reshape(-1).tolist()
    if kind is Kind.TEXTS:
        return _texts(name, elements)
    if kind in (Kind.INTS, Kind.FLOATS):
        return elements
    if len(elements) != 1:
        raise InvalidRequest(name, f"{len(elements)} elements", "exactly one element")
    return from_json(name, elements[0])


def from_json(name: str, value: Any) -> Any:
    """A value of JSON, or one that a client wrote as a string. Raises InvalidRequest."""
    kind = KINDS[name]
    match kind:
        case Kind.TEXT:
            return text_of(name, value)
        case Kind.TEXTS:
            return _texts(name, value if isinstance(value, list | tuple) else [value])
        case Kind.OBJECT:
            return _object(name, value)
        case Kind.INTS | Kind.FLOATS:
            elements = json_of(name, value) if isinstance(value, str) else value
            if not isinstance(elements, list | tuple):
                elements = [elements]
            each = Kind.INT if kind is Kind.INTS else Kind.FLOAT
            return [_scalar(f"{name}[{index}]", each, element) for index, element in enumerate(elements)]
    return _scalar(name, kind, value)


def text_of(name: str, value: Any) -> str:
    """Raises InvalidRequest for what is no string, and for invalid UTF-8."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequest(name, value, "a string")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(name, value, f"valid UTF-8 (byte {error.start} is not)") from None


def json_of(name: str, text: str) -> Any:
    """Raises InvalidRequest."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(name, text, "JSON") from None


def unknown(name: str, value: Any, names: Iterable[str]) -> InvalidRequest:
    """The refusal of a name, with the nearest that exists."""
    path, dot, last = name.rpartition(".")
    public = [each for each in names if each not in INTERNAL]
    near = difflib.get_close_matches(last.lower(), public, 1) if len(last) <= MAX_NAME_LEN else []
    hint = f"; did you mean {path}{dot}{near[0]}?" if near else ""
    return InvalidRequest(name, value, f"there is no input of this name{hint}")


def fits(kind: Kind, value: Any) -> bool:
    """Whether the Triton server takes the JSON value for an input of this kind."""
    elements = flat(value) if isinstance(value, list) else [value]
    match kind:
        case Kind.TEXT | Kind.TEXTS | Kind.OBJECT:
            return all(isinstance(element, str) for element in elements)
        case Kind.BOOL:
            return all(isinstance(element, bool) for element in elements)
        case Kind.FLOAT | Kind.FLOATS:
            return all(isinstance(element, int | float) and not isinstance(element, bool) for element in elements)
    return all(isinstance(element, int) and not isinstance(element, bool) for element in elements)


def flat(value: Any) -> list[Any]:
    return [each for element in value for each in flat(element)] if isinstance(value, list) else [value]


def _scalar(name: str, kind: Kind, value: Any) -> Any:
    if isinstance(value, bytes):
        value = text_of(name, value)
    text = value.strip() if isinstance(value, str) else None
    try:
        if kind is Kind.BOOL and text is not None and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is Kind.BOOL and isinstance(value, bool):
            return value
        if kind is Kind.INT and (text is not None or isinstance(value, int)) and not isinstance(value, bool):
            return int(text if text is not None else value)
        if kind is Kind.FLOAT and (text is not None or isinstance(value, int | float)) and not isinstance(value, bool):
            return float(text if text is not None else value)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(name, value, kind.value)


def _texts(name: str, elements: Iterable[Any]) -> list[str]:
    """Without empty strings: batching clients pad by them, and an empty list is sent as one."""
    texts = [text_of(f"{name}[{index}]", element) for index, element in enumerate(elements)]
    return [text for text in texts if text]


def _object(name: str, value: Any) -> dict[str, Any]:
    found = value
    if isinstance(value, str | bytes):
        text = text_of(name, value)
        found = json_of(name, text) if text.strip() else {}
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidRequest(name, found, Kind.OBJECT.value)
    return found


def _without_aliases(values: Values) -> Values:
    resolved = {name: value for name, value in values.items() if name not in ALIASES}
    for name, value in values.items():
        if name in ALIASES:
            meant = ALIASES[name]
            other = resolved.setdefault(meant, value)
            if other != value:
                raise InvalidRequest(name, value, f"{meant} is given as {other!r}, and means the same")
    return resolved
