"""The default model against transformers, which reads the same GGUF file by its own code."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tools.installation import default_model, gguf_conversion
from tools.installation.default_model import download_gguf, ensure_default_model

CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


def test_weights_and_configuration_equal_what_transformers_reads(smollm2_dir: Path, gguf_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    theirs = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model)
    weights = model.state_dict()
    assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert weights.keys() == theirs["tensors"].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs["tensors"][name]), name
    for field in CONFIG_FIELDS:
        assert getattr(model.config, field) == theirs["config"][field], field
    assert model.config.rms_norm_eps == pytest.approx(theirs["config"]["rms_norm_eps"])
    assert model.config.rope_parameters["rope_theta"] == theirs["config"]["rope_theta"]


def test_the_directory_is_one_that_transformers_takes(smollm2_dir: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_dir)
    text = "Größe 1234, x = 5;\n\n  def f(): 你好 🙂"
    assert theirs(text).input_ids == tokenizer.encode(text).ids
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert theirs.decode(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert theirs.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert theirs.eos_token_id == 2


UNKNOWN_BYTES = bytes.fromhex("04 06 13 14 16 1d f1 f2")  # those of UTF-8 that the model's vocabulary lacks


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_of_known_bytes_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assume(not set(text.encode()) & set(UNKNOWN_BYTES))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("number", ["7", "42", "2018", "3.14159", "1000000"])
def test_every_digit_is_a_token(tokenizer: Tokenizer, number: str) -> None:
    """What llama.cpp's pre-tokenizer `smollm` does, and the model has learned its numbers with."""
    assert [tokenizer.decode([token]) for token in tokenizer.encode(number).ids] == list(number)


def test_special_tokens_are_single_and_nothing_is_prepended(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    assert len(tokenizer.encode("The").ids) == 1  # add_bos_token is false
    assert tokenizer.encode("").ids == []


def test_starts_at_the_same_time_convert_once_and_all_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    leftover = tmp_path / "distserve/models/.SmolLM2-135M-Instruct.tmp-killed"
    leftover.mkdir(parents=True)
    conversions = []

    def convert(source: Path, target: Path) -> None:
        conversions.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "download_gguf", lambda directory: gguf_path)
    monkeypatch.setattr(gguf_conversion, "convert", convert)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(ensure_default_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert results == [tmp_path / "distserve/models/SmolLM2-135M-Instruct"] * 4
    assert (results[0] / "config.json").exists()
    assert not leftover.exists()


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "download_gguf", lambda directory: gguf_path)
    monkeypatch.setattr(gguf_conversion, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_default_model()
    assert [path.name for path in (tmp_path / "distserve/models").iterdir()] == [".SmolLM2-135M-Instruct.lock"]
