"""A directory with tokenizer.model alone, against the sentencepiece library that wrote it, and transformers."""

import io
import json

import pytest
import sentencepiece
from checkpoints import _CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from ensemble.errors import ModelError
from ensemble.tokenizer import Tokenizer

BOS_ID, EOS_ID = 1, 2
TEXTS = st.text() | st.text(alphabet="The capital of France, 你é🙂▁\n\t\0")
LLAMA_2 = {
    "model_type": "bpe",
    "vocab_size": 480,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "character_coverage": 0.99,
}


def train(path, **options):
    """A tokenizer.model with LLaMA-2's options but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20), model_writer=model, minloglevel=2, **LLAMA_2 | options
    )
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return train(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="module")
def processor(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


@pytest.fixture(scope="module", params=[False, True])
def llama_tokenizer(path, request):
    return LlamaTokenizer.from_pretrained(path, legacy=request.param)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS.filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>"))))
def test_texts_are_split_and_joined_as_by_sentencepiece(tokenizer, processor, text):
    token_ids = processor.encode(text)
    assert tokenizer.encode(text) == [BOS_ID, *token_ids]
    assert tokenizer.encode(text, add_special_tokens=False) == token_ids
    assert tokenizer.decode(token_ids) == processor.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS.filter(lambda text: not text.startswith((" ", "▁"))))
def test_texts_are_those_of_transformers(tokenizer, llama_tokenizer, text):
    """But at a space in front, where transformers' own conversion is not that of the model (sentencepiece adds one)."""
    assert tokenizer.encode(text, add_special_tokens=False) == llama_tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens_are_recognised_in_a_text_and_have_none(tokenizer, path):
    text = "<s>The capital</s><s>of France"
    theirs = LlamaTokenizer.from_pretrained(path, legacy=True)
    assert tokenizer.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert tokenizer.decode([*tokenizer.encode("The capital"), EOS_ID]) == "The capital"


def test_sizes_and_special_tokens_are_the_models(tokenizer, processor):
    assert tokenizer.vocab_size == processor.get_piece_size()
    assert tokenizer.eos_token_id == processor.eos_id()


def test_the_configuration_goes_over_the_model(tmp_path):
    train(tmp_path)
    config = {"add_bos_token": False, "eos_token": "<0x0A>", "bos_token": "", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert BOS_ID not in tokenizer.encode("The capital")
    assert tokenizer.eos_token_id == tokenizer.encode("\n")[-1]


KINDS = {
    "user-defined pieces": {"user_defined_symbols": ["<tool>", "<too", "  ", "\n", "ital"]},
    "unigram": {"model_type": "unigram", "vocab_size": 370},
    "unigram, user-defined": {"model_type": "unigram", "vocab_size": 370, "user_defined_symbols": ["<tool>", "\n"]},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 200},
    "normalized characters": {"normalization_rule_name": "nmt_nfkc"},
    "no extra spaces": {"remove_extra_whitespaces": True},
    "no space in front": {"add_dummy_prefix": False},
    "no bytes, no space in front": {"byte_fallback": False, "vocab_size": 200, "add_dummy_prefix": False},
    "none of LLaMA-2's": {
        "model_type": "unigram",
        "vocab_size": 120,
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "user_defined_symbols": ["<tool>"],
    },
}
SAMPLES = [
    "The<tool>capital", "<tool>The", " The", "The <tool> of", "a  b\n\nc ", "The </s> capital", "</s>The<tool>",
    "ﬁne Å①  你好 🙂é", "<0x0A> and\ttabs", "", " ", "<unk>", "<tool><tool", "caput ital",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_read_as_by_transformers(tmp_path, kind):
    train(tmp_path, **KINDS[kind])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in SAMPLES:
        token_ids = ours.encode(text, add_special_tokens=False)
        assert token_ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True), text
        if not any(token in text for token in ("</s>", "<unk>", "<0x0A>")):
            assert token_ids == processor.encode(text), text
    theirs.save_pretrained(tmp_path / "saved")  # as tokenizer.json
    ours = Tokenizer.from_dir(tmp_path / "saved")
    for text in SAMPLES:
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids, text
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True), text
    for legacy in (False, None):  # Vicuna's
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in SAMPLES:
            assert ours.encode(text, False) == theirs(text, add_special_tokens=False).input_ids, (text, legacy)


def test_pieces_that_the_configuration_calls_otherwise(tmp_path):
    train(tmp_path, user_defined_symbols=["<free0>", "<free1>"])
    renamed = {"3": {"content": "<|im_end|>", "special": True}, "4": {"content": "<|tool|>", "special": False}}
    config = {"added_tokens_decoder": renamed, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_id == theirs.eos_token_id == 3
    for text in ("The<|im_end|>capital<|tool|>of", "<free0> The"):
        token_ids = ours.encode(text, add_special_tokens=False)
        assert token_ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"model_type": "word", "vocab_size": 40, "byte_fallback": False}, "a model that is neither BPE nor unigram"),
        ({"model_type": "char", "vocab_size": 60, "byte_fallback": False}, "a model that is neither BPE nor unigram"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_what_transformers_takes_for_another_kind_is_refused_by_name(tmp_path, options, feature):
    train(tmp_path, **{"hard_vocab_limit": False} | options)
    with pytest.raises(ModelError, match=f"tokenizer.model: {feature} is not supported"):
        Tokenizer.from_dir(tmp_path)


PAD_DECODER = {"480": {"content": "<pad>", "special": True}, "481": {"content": "<tool 你>", "special": False}}
ADDED = {"<pad>": 480, "<tool 你>": 481}
NAMES = {"pad_token": "<pad>", "eos_token": {"content": "<tool 你>", "lstrip": False, "rstrip": False}}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, {"added_tokens.json": ADDED}),
        ({}, {"added_tokens.json": ADDED, "special_tokens_map.json": NAMES}),
        ({"pad_token": "<pad>"}, {"added_tokens.json": ADDED}),
        ({}, {"special_tokens_map.json": NAMES}),
        ({"added_tokens_decoder": PAD_DECODER}, {}),
        ({"added_tokens_decoder": PAD_DECODER, "eos_token": "<pad>"}, {"special_tokens_map.json": NAMES}),
        ({"additional_special_tokens": ["<tool 你>"]}, {}),
        ({"add_bos_token": True, "add_eos_token": True}, {}),
        ({"add_bos_token": False, "add_eos_token": None}, {}),
    ],
)
def test_tokens_added_beside_the_model_are_those_of_transformers(tmp_path, config, files):
    train(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True} | config
    for name, content in ({"tokenizer_config.json": config} | files).items():
        (tmp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital<tool 你>of <pad>France"
    token_ids = ours.encode(text)
    assert token_ids == theirs(text).input_ids
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert (ours.vocab_size, ours.eos_token_id) == (len(theirs), theirs.eos_token_id)


def test_an_added_token_has_the_id_it_is_said_to_have(tmp_path):
    """transformers gives it the next one, of which the model has learnt nothing."""
    train(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 485}))
    with pytest.raises(ModelError, match="'<pad>' has the id 485, but the next after the tokenizer's own is 480"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\nIw== 2\n", b"\x0a\xff", b"version https://git-lfs"])
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match="is no SentencePiece model"):
        Tokenizer.from_dir(tmp_path)


def test_half_a_model_is_refused(tmp_path):
    file = train(tmp_path) / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:3001])
    with pytest.raises(ModelError):
        Tokenizer.from_dir(tmp_path)
