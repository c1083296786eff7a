"""Chat messages as OpenAI's clients send them: checked, and in the form that chat templates are written for."""

import json
from collections.abc import Callable
from typing import Any

from ensemble.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_CHARS = 1 << 22  # of the JSON text
Message = dict[str, Any]

_LIST = 'a JSON list of at least one message, such as [{"role": "user", "content": "..."}]'
_PART = 'an object {"type": "text", "text": "..."}: this model reads text alone'
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names it is sent by; templates read the first two


def parse_messages(messages_json: str) -> list[Message]:
    """Each message has a `role` and a `content`: a string, a list of text parts, or none beside `tool_calls`.

    Members that are null are left out, arguments of tool calls are objects, other members stay as they are. Raises
    InvalidRequest that names the part.
    """
    if len(messages_json) > MAX_CHARS:
        raise InvalidRequest("messages", f"{len(messages_json)} characters", f"at most {MAX_CHARS} characters")
    try:
        messages = json.loads(messages_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("messages", messages_json, f"{_LIST} ({error})") from None
    if not isinstance(messages, list):
        raise InvalidRequest("messages", messages_json, _LIST)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest("messages", f"{len(messages)} messages", f"at least one message, at most {MAX_MESSAGES}")
    return [_parse_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _parse_message(field: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(field, message, 'an object {"role": ..., "content": ...}')
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{field}.role", role, f"one of {', '.join(ROLES)}")
    for name in ("name", "tool_call_id"):
        _check(f"{field}.{name}", message.get(name, ""), str, "a string")
    if "tool_calls" in message:
        calls = _check(f"{field}.tool_calls", message["tool_calls"], list, "a list of tool calls")
        message["tool_calls"] = [_parse_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if "content" in message:
        _check_content(f"{field}.content", message["content"])
    elif role != "assistant" or not message.get("tool_calls"):
        allowed = "a string or a list of text parts" + (", or null beside tool_calls" if role == "assistant" else "")
        raise InvalidRequest(f"{field}.content", None, allowed)
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _check_content(field: str, content: Any) -> None:
    if isinstance(content, str):
        return
    for index, part in enumerate(_check(field, content, list, "a string or a list of text parts")):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{field}[{index}]", part, _PART)


def _parse_call(field: str, call: Any) -> dict[str, Any]:
    """A call's arguments come as JSON text, and templates write them as JSON: they get the object."""
    function = _check(field, call, dict, 'an object {"id": ..., "type": "function", "function": ...}').get("function")
    form = 'an object {"name": "...", "arguments": "{...}"}'
    _check(f"{field}.function", function, dict, form)
    _check(f"{field}.function.name", function.get("name"), str, "a string")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    allowed = "an object, or its JSON text"
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field}.function.arguments", function["arguments"], allowed)
    return {**call, "function": {**function, "arguments": arguments}}


def _check(field: str, value: Any, kind: type, allowed: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidRequest(field, value, allowed)
    return value


def with_contents(messages: list[Message], convert: Callable[[list[str]], Any], empty: str | None) -> list[Message]:
    """The messages with `convert` of their texts as content, or `empty` where there is none; None: left out."""
    found = []
    for message in messages:
        content = message.get("content", empty)
        if content is not None:
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            message = {**message, "content": convert(texts)}
        found.append(message)
    return found
