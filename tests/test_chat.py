"""Chat templates render as transformers renders them; bad messages are named."""

import json
from pathlib import Path

import pytest

from ensemble.chat import ChatTemplate
from ensemble.errors import InvalidRequest
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import make_tiny_tokenizer

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
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate.from_dir(tmp_path).render('[{"role": "user", "content": "x"}]')
