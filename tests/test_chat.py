"""Chat templates render as transformers renders them; bad messages are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from ensemble.chat import ChatTemplate
from ensemble.errors import InvalidRequest
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import PAD, make_tiny_tokenizer
from tests.test_sentencepiece_model import train

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? {{ 1 + 1 }}\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3 <|im_end|>"},
    ],
]
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def transformers_ids(path: Path, messages: list[dict[str, str]]) -> list[int]:
    from transformers import AutoTokenizer

    rendered = AutoTokenizer.from_pretrained(path).apply_chat_template(messages, add_generation_prompt=True)
    return list(rendered["input_ids"] if hasattr(rendered, "keys") else rendered)


def our_ids(path: Path, messages: list[dict[str, str]]) -> list[int]:
    text = ChatTemplate.from_dir(path).render(json.dumps(messages))
    return Tokenizer.from_dir(path).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_default_model_as_transformers(smollm2_dir: Path, messages: list[dict[str, str]]) -> None:
    assert our_ids(smollm2_dir, messages) == transformers_ids(smollm2_dir, messages)


@pytest.fixture
def llama2_like(tmp_path: Path) -> Path:
    make_tiny_tokenizer(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"chat_template": LLAMA2}))
    return tmp_path


@pytest.mark.parametrize("messages", [CONVERSATIONS[0], CONVERSATIONS[2]])
def test_special_tokens_of_the_template_as_transformers(llama2_like: Path, messages: list[dict[str, str]]) -> None:
    assert our_ids(llama2_like, messages) == transformers_ids(llama2_like, messages)


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ("not json", "JSON list"),
        ("{}", "at least one message"),
        ("[]", "at least one message"),
        ("[3]", "messages[0] = 3"),
        ('[{"role": "user"}]', "messages[0].content"),
        ('[{"role": "wizard", "content": ""}]', "messages[0].role = 'wizard'"),
        ('[{"role": "system", "content": "x"}]', "Only user and assistant roles"),
        ('[{"role": "user", "content": "\\ud800"}]', "surrogates not allowed"),
        ("[" * 100_000, "a JSON list"),
    ],
)
def test_bad_messages_are_named(llama2_like: Path, messages: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate.from_dir(llama2_like).render(messages)
    assert part in str(caught.value)


def test_a_template_cannot_reach_out(tmp_path: Path) -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(InvalidRequest):
        template.render('[{"role": "user", "content": "x"}]')


def test_model_without_a_template(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="which has no chat template: use text_input"):
        ChatTemplate.from_dir(tmp_path).render('[{"role": "user", "content": "x"}]')


TEMPLATES = {
    "generation": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "dashes": "{%- for m in messages -%} {%- generation -%} {{ m.content }} {%- endgeneration %}!{% endfor %}",
    "scope of generation": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "loop in generation": "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n{% for m in messages %}\n    {{ m.content }}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}|{{ '<&' | tojson(indent=2) }}|{{ messages | tojson(ensure_ascii=True) }}",
    "tojson, all": "{{ messages | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}",
    "none": "{{ tools is none }}{{ documents is none }}{{ tools is not none }}{{ tools is defined }}{{ x is defined }}",
    "prompt": "{% if add_generation_prompt %}assistant:{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ d | items | list }}",
    "date": "{{ strftime_now('%Y') }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ unk_token is defined }}",
    "no escapes": "{{ '<b>' }}{{ messages[0].content }}",
    "macro": "{% macro show(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "other members": "{% for m in messages %}{{ m.name }}{{ m.tool_call_id }}{{ 'x' in m }}{% endfor %}",
}
TOKENS = {
    "pad_token": {"content": PAD, "lstrip": False, "special": True, "__type": "AddedToken"},
    "image_token": "<img>",
}
TALK = [
    {"role": "system", "content": "Größe <&> 你好 'x'", "name": "ann", "x": None},
    {"role": "user", "content": "Hello\n"},
    {"role": "assistant", "content": "2", "reasoning": "because"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_sees_what_transformers_gives_it(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, chat_template=TEMPLATES[name], **TOKENS)
    assert ours(tmp_path, TALK) == theirs(tmp_path, TALK)


def write_config(path: Path, **fields: Any) -> Path:
    make_tiny_tokenizer(path)
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | fields
    config_file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return path


def ours(path: Path, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate.from_dir(path).render(json.dumps(messages))


def theirs(path: Path, messages: list[dict[str, Any]]) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({"chat_template": "one {{ messages[0].content }}"}, {}),
        ({"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]}, {}),
        ({"chat_template": {"default": "b 你好", "rag": "a"}}, {}),
        ({"chat_template": "config"}, {"chat_template.jinja": "file 你好\n"}),
        ({}, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tool"}),
        ({"chat_template": "x"}, {"additional_chat_templates/default.jinja": "more"}),
        ({}, {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "more"}),
        ({"chat_template": "x", "add_bos_token": True, "add_eos_token": False}, {}),
    ],
)
def test_which_template_counts_is_as_transformers_has_it(
    tmp_path: Path, fields: dict[str, Any], files: dict[str, str]
) -> None:
    write_config(tmp_path, **fields)
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert ours(tmp_path, TALK) == theirs(tmp_path, TALK)


@pytest.mark.parametrize(
    ("fields", "files", "fault"),
    [
        ({"chat_template": "{% for %}"}, {}, "tokenizer_config.json: "),
        ({"chat_template": "{{ 1 | no_such_filter }}"}, {}, "No filter named 'no_such_filter'"),
        ({"chat_template": "{% unknown_tag %}"}, {"chat_template.jinja": "{% other %}"}, "chat_template.jinja: "),
        ({"chat_template": "x"}, {"chat_template.jinja": b"\xff"}, "chat_template.jinja: 'utf-8' codec"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, {}, "has chat templates rag, but none named default"),
        ({"chat_template": 3}, {}, "neither a text, nor a list of names and templates"),
        ({"chat_template": ["x"]}, {}, "neither a text, nor a list of names and templates"),
        ({"chat_template": {"default": None}}, {}, "neither a text, nor a list of names and templates"),
    ],
)
def test_a_template_that_cannot_be_used_costs_messages_alone(
    tmp_path: Path, fields: dict[str, Any], files: dict[str, str | bytes], fault: str
) -> None:
    write_config(tmp_path, **fields)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    template = ChatTemplate.from_dir(tmp_path)
    assert template.fault is not None and fault in template.fault and str(tmp_path) in template.fault
    assert "\n" not in template.fault
    with pytest.raises(InvalidRequest, match="not for this model, whose template cannot be used"):
        template.render(json.dumps(TALK))


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln", "n": 2}'}}
TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content is none }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}\n"
    "{% endfor %}"
)
CHATML = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</>' }}{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.type }}={{ part.text }};{% endfor %}{% endfor %}"


def test_tool_calls_of_openai_clients_are_those_of_transformers(tmp_path: Path) -> None:
    """Their arguments come as JSON text; transformers' documentation wants the object."""
    write_config(tmp_path, chat_template=TOOL_TEMPLATE)
    asked = {"role": "user", "content": "?"}
    result = {"role": "tool", "content": "ok", "tool_call_id": "c1", "name": "f"}
    sent = [asked, {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}, result]
    as_object = {**CALL, "function": {"name": "f", "arguments": {"city": "Köln", "n": 2}}}
    meant = [asked, {"role": "assistant", "content": None, "tool_calls": [as_object]}, result]
    assert ours(tmp_path, sent) == theirs(tmp_path, meant)
    assert 'f({"city": "Köln", "n": 2})' in ours(tmp_path, sent)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "<user>a</>"),
        (CHATML, [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}], "<user>a\nb</>"),
        (CHATML, [{"role": "user", "content": []}], "<user></>"),
        (CHATML, [{"role": "developer", "content": "a"}], "<system>a</>"),
        (CHATML + "{# developer #}", [{"role": "developer", "content": "a"}], "<developer>a</>"),
        (CHATML, [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "<assistant></>"),
        (CHATML, [{"role": "assistant", "tool_calls": [CALL]}], "<assistant></>"),
        (CHATML, [{"role": "tool", "content": "4", "tool_call_id": "c"}], "<tool>4</>"),
        (CHATML, [{"role": "user", "content": "a", "name": None, "tool_calls": None}], "<user>a</>"),
        (PARTS, [{"role": "user", "content": "a"}], "text=a;"),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}], "text=a;text=b;"),
    ],
)
def test_messages_as_openai_clients_send_them(template: str, messages: list[dict[str, Any]], expected: str) -> None:
    assert ChatTemplate(template, {}).render(json.dumps(messages)) == expected


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ("3", "messages = '3' is not valid: a JSON list of at least one message"),
        ("null", "a JSON list of at least one message"),
        ('"hello"', "a JSON list of at least one message"),
        ('{"role": "user", "content": "x"}', "a JSON list of at least one message"),
        ('[["user", "x"]]', """messages[0] = ['user', 'x'] is not valid: an object {"role": ..., "content": ...}"""),
        ('[{"role": ["user"], "content": "x"}]', "messages[0].role = ['user'] is not valid: one of system, developer"),
        ('[{"content": "x"}]', "messages[0].role = None"),
        ('[{"role": "user", "content": 3}]', "messages[0].content = 3 is not valid: a string or a list of text parts"),
        ('[{"role": "user", "content": null}]', "messages[0].content = None is not valid: a string or a list of"),
        ('[{"role": "assistant", "content": null}]', "or null beside tool_calls"),
        ('[{"role": "assistant", "content": null, "tool_calls": []}]', "or null beside tool_calls"),
        ('[{"role": "user", "content": {"type": "text"}}]', "messages[0].content = {'type': 'text'}"),
        ('[{"role": "user", "content": ["x"]}]', "messages[0].content[0] = 'x' is not valid: an object"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "messages[0].content[0]"),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]', "this model reads text alone"),
        ('[{"role": "user", "content": "x", "name": 3}]', "messages[0].name = 3 is not valid: a string"),
        ('[{"role": "tool", "content": "x", "tool_call_id": []}]', "messages[0].tool_call_id = []"),
        ('[{"role": "assistant", "tool_calls": {}}]', "messages[0].tool_calls = {} is not valid: a list"),
        ('[{"role": "assistant", "tool_calls": [3]}]', "messages[0].tool_calls[0] = 3"),
        ('[{"role": "assistant", "tool_calls": [{}]}]', "messages[0].tool_calls[0].function = None"),
        ('[{"role": "assistant", "tool_calls": [{"function": {}}]}]', "tool_calls[0].function.name = None"),
        (
            '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]',
            "messages[0].tool_calls[0].function.arguments = '{' is not valid: an object, or its JSON text",
        ),
        ('[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}]', "arguments = '3'"),
        ('[{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]", "messages[0].content[0] = [[[["),
        ("[" + ",".join(['{"role": "user", "content": ""}'] * 4097) + "]", "4097 messages' is not valid: at least one"),
        ('[{"role": "user", "content": "' + "x" * (1 << 22) + '"}]', "at most 4194304 characters"),
    ],
)
def test_a_wrong_member_is_named_with_what_is_wanted(messages: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML, {}).render(messages)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_a_template_says_can_be_sent() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("{{ raise_exception(messages[0].content) }}", {}).render(
            '[{"role": "user", "content": "\\ud800!"}]'
        )
    assert str(caught.value).encode().endswith(b"the chat template refuses it: ?!")


def test_special_tokens_of_a_tokenizer_model_alone(tmp_path: Path) -> None:
    """Not named in tokenizer_config.json, which holds the template."""
    train(tmp_path)
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ours(tmp_path, TALK) == theirs(tmp_path, TALK)
