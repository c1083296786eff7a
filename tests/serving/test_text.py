"""Text through the whole server, of a checkpoint as users have them: LLaMA-2's kind of tokenizer, an end token that the
tokenizer alone names, files that are not ASCII under the C locale, and a chat template that cannot be compiled."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests.checkpoints import make_tiny_llama
from tests.serving.clients import Answer, generate
from tests.serving.deployments import deploy
from tests.serving.oracle import greedy_by_transformers
from tests.test_sentencepiece_model import train
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server
PROMPT = "The capital of France is"
NUM_TOKENS = 12
END = 6  # how many greedy tokens come before the one that the tokenizer names as its end token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[int]]:
    """Its directory, transformers' tokenizer of it, and the greedy answer to PROMPT where nothing ends it."""
    from transformers import AutoTokenizer

    path = make_tiny_llama(tmp_path_factory.mktemp("größe"), vocab_size=480, eos_token_id=None)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / file).unlink()
    train(path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "chat_template": "{% 你好 %}"}

    def write(**fields: Any) -> None:
        (path / "tokenizer_config.json").write_text(json.dumps(config | fields, ensure_ascii=False), encoding="utf-8")

    write()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer(PROMPT).input_ids
    (answer,) = greedy_by_transformers(path, [prompt], NUM_TOKENS, torch.float64)
    assert answer[END] not in answer[:END]
    write(eos_token=tokenizer.convert_ids_to_tokens(answer[END]))
    return path, AutoTokenizer.from_pretrained(path), answer


@pytest.fixture(scope="module")
def server(checkpoint: tuple[Path, Any, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
            environment.setenv(name, value)
        with TritonServer(deploy(checkpoint[0]), log_path=tmp_path_factory.mktemp("server") / "log") as server:
            server.wait_ready(timeout_s=120)
            yield server


def ask(server: TritonServer, model: str = "scheduler", **values: Any) -> Answer:
    asked = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0.0, "return_finish_reason": True}
    return generate(server.grpc_url, model, **asked | values)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
def test_prompt_and_answer_are_what_transformers_decodes_of_all_ids(
    server: TritonServer, checkpoint: tuple[Path, Any, list[int]], model: str, stream: bool
) -> None:
    _, theirs, answer = checkpoint
    prompt = theirs(PROMPT).input_ids
    for num_tokens in range(1, END + 1):
        whole = theirs.decode(prompt + answer[:num_tokens], skip_special_tokens=True)
        asked = {"model": model, "stream": stream, "max_tokens": num_tokens}
        assert PROMPT + ask(server, **asked).text == whole
        assert ask(server, exclude_input_in_output=False, **asked).text == whole


def test_the_end_token_that_the_tokenizer_alone_names_ends_the_answer_and_has_no_text(
    server: TritonServer, checkpoint: tuple[Path, Any, list[int]]
) -> None:
    _, theirs, expected = checkpoint
    answer = ask(server, return_output_ids=True)
    assert answer.output_ids == expected[: END + 1]
    assert answer.finish_reason == "stop"
    assert PROMPT + answer.text == theirs.decode(theirs(PROMPT).input_ids + expected[:END], skip_special_tokens=True)


def test_a_stop_word_that_is_a_special_token_ends_the_answer(
    server: TritonServer, checkpoint: tuple[Path, Any, list[int]]
) -> None:
    _, theirs, expected = checkpoint
    asked = {"ignore_eos": True, "return_output_ids": True}
    assert ask(server, **asked).output_ids == expected
    answer = ask(server, stop_words=[theirs.eos_token], **asked)
    assert answer.output_ids == expected[: END + 1]
    assert answer.finish_reason == "stop"
    assert PROMPT + answer.text == theirs.decode(theirs(PROMPT).input_ids + expected[:END], skip_special_tokens=True)


def test_a_template_that_cannot_be_compiled_costs_messages_alone(
    server: TritonServer, checkpoint: tuple[Path, Any, list[int]]
) -> None:
    path, _, _ = checkpoint
    lines = server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    line = f"distserve: `messages` cannot be served: {path}/tokenizer_config.json: "
    assert len([each for each in lines if each.startswith(line)]) == 1
    messages = json.dumps([{"role": "user", "content": "Hello"}])
    with pytest.raises(InferenceServerException, match=r"messages = .* template cannot be used"):
        generate(server.grpc_url, "ensemble", messages=messages, max_tokens=4)
