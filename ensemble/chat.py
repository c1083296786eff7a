"""Chat messages to a prompt: the model's own template, in jinja2's sandbox, as transformers renders it."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from ensemble.errors import InvalidRequest

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """The template of one model directory: `chat_template.jinja`, or the one in tokenizer_config.json."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source) if source is not None else None
        self._special_tokens = special_tokens

    @classmethod
    def from_dir(cls, path: str | Path) -> "ChatTemplate":
        path = Path(path)
        config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
        config = json.loads(config_file.read_text()) if config_file.exists() else {}
        source = template_file.read_text() if template_file.exists() else config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {each["name"]: each["template"] for each in source}.get("default")
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token") and value}
        return cls(source, tokens)

    def render(self, messages_json: str) -> str:
        """The prompt for the next answer. The template writes the special tokens itself. Raises InvalidRequest."""
        messages = parse_messages(messages_json)
        if self._template is None:
            raise InvalidRequest("messages", messages_json, "this model has no chat template: use text_input")
        try:
            prompt = self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
            prompt.encode()  # a lone surrogate, which JSON may escape, is no text
            return prompt
        except Exception as error:  # whatever a template may raise, it was these messages
            raise InvalidRequest("messages", messages_json, f"the chat template refuses it: {error}") from None


def parse_messages(messages_json: str) -> list[dict[str, str]]:
    """Checks a JSON list of {"role", "content"}. Raises InvalidRequest that names the part."""
    try:
        messages = json.loads(messages_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("messages", messages_json, f"a JSON list of messages ({error})") from None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", messages_json, "a JSON list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]", message, 'an object {"role": ..., "content": ...}')
        if message.get("role") not in ROLES:
            raise InvalidRequest(f"messages[{index}].role", message.get("role"), f"one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InvalidRequest(f"messages[{index}].content", message.get("content"), "a string")
    return messages


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
