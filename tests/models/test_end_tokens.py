"""End tokens: of all files that name one, none where they say so, and never one that is no token."""

import json

import pytest
from checkpoints import EOS, EOS_ID, VOCAB_SIZE, make_tiny_tokenizer
from tokenizers import AddedToken, Tokenizer

from ensemble.errors import ModelError
from ensemble.models.spec import load_model_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
}


def write(path, config=None, generation_config=None, tokenizer_config=None):
    (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config))
    if tokenizer_config is not None:
        make_tiny_tokenizer(path)
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.mark.parametrize(
    ("config", "generation_config", "tokenizer_config", "expected"),
    [
        ({}, None, None, set()),
        ({"eos_token_id": 2}, None, None, {2}),
        ({"eos_token_id": [2, 7]}, {}, None, {2, 7}),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 9]}, None, {2, 5, 9}),
        ({"eos_token_id": 2}, {"eos_token_id": None}, None, {2}),
        ({"eos_token_id": None}, {"eos_token_id": 9}, None, {9}),
        ({"eos_token_id": -1}, {"eos_token_id": [-1, None, 0]}, None, {0}),
        ({"eos_token_id": VOCAB_SIZE - 1}, None, {}, {VOCAB_SIZE - 1}),
        ({}, None, {"eos_token": EOS}, {EOS_ID}),
        ({"eos_token_id": 2}, {"eos_token_id": 5}, {"eos_token": {"content": EOS}}, {2, 5, EOS_ID}),
        ({"eos_token_id": 2}, None, {"eos_token": None}, {2}),
    ],
)
def test_end_tokens_are_the_union_of_what_the_files_name(
    tmp_path, config, generation_config, tokenizer_config, expected
):
    spec = load_model_spec(write(tmp_path, config, generation_config, tokenizer_config))
    assert spec.eos_token_ids == frozenset(expected)


def test_a_chat_model_whose_tokenizer_alone_names_its_end_token(tmp_path):
    """By its id in tokenizer_config.json, and by the tokenizer itself."""
    write(tmp_path, {"eos_token_id": 2}, {}, {"eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": VOCAB_SIZE + 1, "eos_token_id": 2}))
    assert load_model_spec(tmp_path).eos_token_ids == {2, VOCAB_SIZE}
    decoder = {str(VOCAB_SIZE): {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "added_tokens_decoder": decoder})
    )
    assert load_model_spec(tmp_path).eos_token_ids == {2, VOCAB_SIZE}


@pytest.mark.parametrize(
    ("config", "generation_config", "tokenizer_config", "message"),
    [
        ({"eos_token_id": VOCAB_SIZE}, None, None, rf"/config.json: eos_token_id = {VOCAB_SIZE} is not in the vocab"),
        ({"eos_token_id": -2}, None, None, "/config.json: eos_token_id = -2 is not"),
        ({}, {"eos_token_id": [2, 128009]}, None, "generation_config.json: eos_token_id = 128009 is not in the vocab"),
        ({}, {"eos_token_id": "2"}, None, "generation_config.json: eos_token_id = '2' is not in the vocabulary: ids"),
        ({}, {"eos_token_id": True}, None, "generation_config.json: eos_token_id = True is not"),
        ({}, None, {"eos_token": "<new>"}, f"tokenizer_config.json: id of eos_token = {VOCAB_SIZE} is not in the"),
    ],
)
def test_an_end_token_outside_the_vocabulary_is_refused_by_name(
    tmp_path, config, generation_config, tokenizer_config, message
):
    with pytest.raises(ModelError, match=message):
        load_model_spec(write(tmp_path, config, generation_config, tokenizer_config))
