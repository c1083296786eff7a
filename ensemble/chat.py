"""Chat messages to a prompt: the model's own template, in jinja2's sandbox, as transformers renders it."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ensemble.chat_messages import Message, parse_messages, with_contents
from ensemble.errors import InvalidRequest
from ensemble.sentencepiece_model import read_sentencepiece_model
from ensemble.tokenizer_config import read_tokenizer_config


class ChatTemplate:
    """A model's template. Without a usable one `render` raises, and `fault` says why if it is the template's."""

    def __init__(self, source: str | None, special_tokens: dict[str, str], file: Path | None = None) -> None:
        self.fault: str | None = None
        self._template: jinja2.Template | None = None
        self._special_tokens = special_tokens
        self._wants_parts = False  # the template reads a list of parts alone, as those of models that see do
        try:
            if source is not None:
                self._template = _environment().from_string(source)
                self._wants_parts = self._shows_parts_alone()
        except Exception as error:  # whatever is wrong with it, it costs `messages` alone
            self.fault = f"{file or 'chat template'}: {' '.join(str(error).split())}"
        self._knows_developers = "developer" in (source or "")
        self._knows_tool_calls = "tool_calls" in (source or "")

    @classmethod
    def from_dir(cls, path: str | Path) -> "ChatTemplate":
        """Reads what transformers reads; of several named templates the one named `default`.

        Raises ModelError for a tokenizer_config.json that cannot be read.
        """
        path = Path(path)
        config = read_tokenizer_config(path)
        special_tokens = config.special_tokens
        if (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists():
            renamed = {token_id: token.content for token_id, token in config.added_tokens.items()}
            special_tokens = read_sentencepiece_model(path / "tokenizer.model", renamed).special_tokens | special_tokens
        files = _template_files(path)  # where there are any, those in tokenizer_config.json do not count
        file = files.get("default", path / "tokenizer_config.json")
        source = fault = None
        try:
            if "default" in files:
                source = file.read_text(encoding="utf-8")
            else:
                templates = _templates_of(None if files else config.fields.get("chat_template"))
                source = templates.get("default")
                names = sorted({*files, *templates})
                if names and source is None:
                    raise ValueError(f"has chat templates {', '.join(names)}, but none named default")
        except (OSError, ValueError) as error:
            fault = f"{file}: {error}"
        template = cls(source, special_tokens, file)
        template.fault = fault or template.fault
        return template

    def render(self, messages_json: str, options: Mapping[str, Any] | None = None) -> str:
        """The prompt for the next answer. The template writes the special tokens itself. Raises InvalidRequest.

        options: variables that the template may know, beside those that it always gets.
        """
        messages = parse_messages(messages_json)
        if self._template is None:
            reason = f"whose template cannot be used ({self.fault})" if self.fault else "which has no chat template"
            raise InvalidRequest("messages", messages_json, f"not for this model, {reason}: use text_input")
        try:
            prompt = self._render(self._adapt(messages), options or {})
            prompt.encode()  # a lone surrogate, which JSON may escape, is no text
            return prompt
        except Exception as error:  # whatever a template may raise, it was these messages
            raise InvalidRequest("messages", messages_json, f"the chat template refuses it: {error}") from None

    def _render(self, messages: list[Message], options: Mapping[str, Any]) -> str:
        assert self._template is not None
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._template.render({**options, **self._special_tokens, **given})

    def _adapt(self, messages: list[Message]) -> list[Message]:
        """To what this template knows: the role `developer`, parts of text, and no content beside tool calls."""
        if not self._knows_developers:
            roles = {"developer": "system"}
            messages = [{**message, "role": roles.get(message["role"], message["role"])} for message in messages]
        empty = None if self._knows_tool_calls else ""
        return with_contents(messages, _text_parts if self._wants_parts else "\n".join, empty)

    def _shows_parts_alone(self) -> bool:
        probe = "0a1b2c3d"

        def shows(content: Any) -> bool:
            try:
                return probe in self._render([{"role": "user", "content": content}], {})
            except Exception:
                return False

        return not shows(probe) and shows(_text_parts([probe]))


def _text_parts(texts: list[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _template_files(path: Path) -> dict[str, Path]:
    """name |-> file."""
    file = path / "chat_template.jinja"
    files = {"default": file} if file.exists() else {}
    return files | {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}


def _templates_of(value: Any) -> dict[str, str]:
    """name |-> template, of `chat_template` in tokenizer_config.json: one, or several by name. Raises ValueError."""
    if value is None:
        return {}
    try:
        named = {each["name"]: each["template"] for each in value} if isinstance(value, list) else value
    except (KeyError, TypeError):
        named = None
    templates = {"default": named} if isinstance(named, str) else named
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise ValueError("chat_template is neither a text, nor a list of names and templates")
    return templates


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the model has said, for training; it is shown as it is."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja2's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
