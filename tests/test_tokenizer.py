"""The tokenizer against transformers, for any text and any token ids."""

import json
import threading

import pytest
from checkpoints import BOS, BOS_ID, EOS, PAD, make_tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from ensemble.errors import ModelError
from ensemble.tokenizer import IncrementalDetokenizer, Tokenizer

EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text() | st.text(alphabet="aé你🙂 <s>\n'0") | st.just("</s> the capital <pad>of")
SPACE = "▁"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Byte-level BPE, with an added token that is not special."""
    path = tmp_path_factory.mktemp("byte_level")
    make_tiny_tokenizer(path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool 你>"), AddedToken("<call>")])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """LLaMA-2's kind: spaces as a character of their own, unknown characters as byte tokens."""
    path = tmp_path_factory.mktemp("sentencepiece")
    pieces = [*"abcdefghijklmnopqrstuvwxyz'0é", SPACE, "th", "the", f"{SPACE}the", f"{SPACE}t", "你"]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "t")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", BOS, EOS])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def pair(request):
    """Ours, and transformers'."""
    path = request.getfixturevalue(request.param)
    return Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)


def stream(tokenizer, token_ids):
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.push([token_id]) for token_id in token_ids], detokenizer.flush()


@EXAMPLES
@given(text=TEXTS)
def test_encode_is_that_of_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs(text).input_ids


@EXAMPLES
@given(text=TEXTS)
def test_decode_of_a_text_is_that_of_transformers_and_no_character_is_halved(pair, text):
    ours, theirs = pair
    token_ids = ours.encode(text)
    deltas, rest = stream(ours, token_ids)
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert "".join(deltas) + rest == ours.decode(token_ids)
    assert rest.isascii(), "only characters for which byte tokens are not meant wait for the next token"


@EXAMPLES
@given(data=st.data())
def test_any_byte_level_tokens_decode_as_with_transformers(byte_level_pair, data):
    ours, theirs = byte_level_pair
    token_ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1)))
    deltas, rest = stream(ours, token_ids)
    assert "".join(deltas) + rest == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def byte_level_pair(byte_level):
    return Tokenizer.from_dir(byte_level), AutoTokenizer.from_pretrained(byte_level)


@EXAMPLES
@given(data=st.data())
def test_deltas_are_the_decoded_text_however_tokens_are_grouped(pair, data):
    ours, _ = pair
    token_ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=4)))
    detokenizer = IncrementalDetokenizer(ours)
    groups = [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]
    assert "".join(detokenizer.push(group) for group in groups) + detokenizer.flush() == ours.decode(token_ids)


def test_a_character_comes_with_its_last_byte(sentencepiece):
    tokenizer = Tokenizer.from_dir(sentencepiece)
    token_ids = tokenizer.encode("a🙂b")
    deltas, _ = stream(tokenizer, token_ids)
    assert [delta for delta in deltas if delta] == ["a", "🙂", "b"]
    assert len(token_ids) > 6, "the character is not spread over byte tokens"


def test_half_a_character_at_the_end_is_what_transformers_makes_of_it(pair):
    ours, theirs = pair
    token_ids = ours.encode("a🙂")[:-1]
    deltas, rest = stream(ours, token_ids)
    assert "".join(deltas) == "a" and set(rest) == {"\ufffd"}
    assert "a" + rest == theirs.decode(token_ids, skip_special_tokens=True)


@EXAMPLES
@given(data=st.data())
def test_any_tokens_of_sentencepiece_decode_as_with_transformers(sentencepiece_pair, data):
    """A run of byte tokens counts as a whole. Line breaks and what is not ASCII is shown before the run ends, though,
    and may turn out to have been in a run that is no text: none of that here."""
    ours, theirs = sentencepiece_pair
    shown_at_once = {*b"\t\n\r", *range(0xC2, 0xF5)}
    token_ids = [i for i in range(ours.vocab_size) if not (3 <= i < 259 and i - 3 in shown_at_once)]
    token_ids = data.draw(st.lists(st.sampled_from(token_ids)))
    deltas, rest = stream(ours, token_ids)
    assert "".join(deltas) + rest == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def sentencepiece_pair(sentencepiece):
    return Tokenizer.from_dir(sentencepiece), AutoTokenizer.from_pretrained(sentencepiece)


def test_bytes_that_are_no_text_are_shown_as_by_transformers(sentencepiece_pair):
    ours, theirs = sentencepiece_pair
    byte_tokens = [f"<0x{byte:02X}>" for byte in (0x43, 0xE4, 0xBD, 0xFF, 0x43)]
    token_ids = [*ours.encode("a"), *map(theirs.convert_tokens_to_ids, [*byte_tokens, "é"])]
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True) == "a" + 5 * "\ufffd" + "é"


def test_white_space_and_characters_without_a_token_are_shown_at_once(sentencepiece):
    tokenizer = Tokenizer.from_dir(sentencepiece)
    token_ids = tokenizer.encode("a\n🙂\n", add_special_tokens=False)
    deltas, rest = stream(tokenizer, token_ids)
    assert [delta for delta in deltas if delta] == ["a", "\n", "🙂", "\n"] and rest == ""


@EXAMPLES
@given(text=TEXTS, data=st.data())
def test_prompt_and_answer_together_are_what_transformers_decodes_of_all_ids(pair, text, data):
    """Wherever the prompt ends: after BOS alone, before a space, within a character."""
    ours, theirs = pair
    token_ids = ours.encode(text)
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt = ours.decode_prompt(token_ids[:cut])
    answer = IncrementalDetokenizer(ours, token_ids[:cut])
    answer_text = "".join(answer.push([token_id]) for token_id in token_ids[cut:]) + answer.flush()
    assert prompt + answer_text == theirs.decode(token_ids, skip_special_tokens=True)


def test_the_space_between_prompt_and_answer_is_kept(sentencepiece):
    tokenizer = Tokenizer.from_dir(sentencepiece)
    prompt, answer = tokenizer.encode("my name is"), tokenizer.encode("john", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer, prompt).push(answer) == " john"
    assert IncrementalDetokenizer(tokenizer, prompt[:1]).push(answer) == "john", "BOS alone has no text"


def test_a_long_prompt_costs_an_answer_nothing(byte_level):
    """Only its last tokens are looked at."""
    tokenizer = Tokenizer.from_dir(byte_level)

    class LastOf(list):
        def __iter__(self):
            raise AssertionError("the whole prompt is read")

    prompt = LastOf(tokenizer.encode("The capital of France is 你")[:-1])
    assert IncrementalDetokenizer(tokenizer, prompt).push([tokenizer.encode("你")[-1]]) == "你"


def test_ids_without_a_token_have_no_text(byte_level):
    tokenizer = Tokenizer.from_dir(byte_level)
    ids = tokenizer.encode("the capital")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "the capital"


def test_sizes_and_end_of_sequence(byte_level):
    tokenizer = Tokenizer.from_dir(byte_level)
    theirs = AutoTokenizer.from_pretrained(byte_level)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": None},
        {"additional_special_tokens": ["<call>", {"content": "<new>", "__type": "AddedToken"}]},
        {"extra_special_tokens": {"image_token": "<call>"}},
        {"image_token": "<new>"},
        {"added_tokens_decoder": {"384": {"content": "<tool 你>", "special": False}}},
        {"added_tokens_decoder": {"385": {"content": "<call>", "special": True}}},
        {"added_tokens_decoder": {"386": {"content": "<new>", "special": False, "lstrip": True}}},
        {"added_tokens_decoder": {"2": {"content": PAD, "special": False, "rstrip": True}}},
        {"bos_token": {"content": EOS, "__type": "AddedToken"}},
        {"unk_token": "<call>"},
        {"pad_token": "<new>"},
    ],
)
def test_special_tokens_are_those_of_transformers(tmp_path, byte_level, config):
    base = json.loads((byte_level / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | config))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = f"the capital {PAD}<call><new> of"
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("opt", {"tokenizer_class": "GPT2Tokenizer"}),
        ("opt", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}),
        ("opt", {"add_bos_token": True, "add_eos_token": True}),
        ("opt", {"add_prefix_space": True}),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("qwen3", {"add_prefix_space": True}),
        ("llama", {"tokenizer_class": "Qwen2Tokenizer"}),
    ],
)
def test_files_without_tokenizer_json_are_read(tmp_path, model_type, config):
    """vocab.json and merges.txt, as OPT's and Qwen's checkpoints have been published."""
    make_tiny_tokenizer(tmp_path, add_bos=False)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").unlink()
    backend.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS, **config}))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The capital of France is 你好", "in 10, 128 it's I'LL\n\n x\ty  ", " e\u0301</s>A\u030a"):
        assert ours.encode(text) == theirs(text).input_ids
        assert (ours.encode(text)[0] == BOS_ID) == bool(config.get("add_bos_token"))
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


def test_special_tokens_map_names_what_tokenizer_config_does_not(tmp_path, byte_level):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    names = {"eos_token": {"content": "<call>", "lstrip": False, "normalized": False, "rstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_id == theirs.eos_token_id == 385
    assert ours.decode([385]) == theirs.decode([385], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("tokenizer_config.json", "[", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: is not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "tokenizer_config.json: eos_token = 3 is no token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "'x' is no token id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"text": "y"}}}', r"added_tokens_decoder\['9'\]"),
        ("special_tokens_map.json", '{"eos_token": {}}', ""),
        ("special_tokens_map.json", '{"eos_token": {"text": ""}}', "special_tokens_map.json: eos_token"),
        ("added_tokens.json", '{"<new>": null}', "added_tokens.json: None is no token id"),
        ("added_tokens.json", '{"<new>": 400}', "added token '<new>' has the id 400, but the next .* is 386"),
    ],
)
def test_what_is_wrong_beside_the_tokenizer_is_named(tmp_path, byte_level, file, content, part):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / file).write_text(content)
    if not part:
        assert Tokenizer.from_dir(tmp_path).eos_token_id is None
        return
    with pytest.raises(ModelError, match=part):
        Tokenizer.from_dir(tmp_path)


def test_many_threads_share_a_tokenizer(byte_level):
    tokenizer = Tokenizer.from_dir(byte_level)
    texts = [f"The capital number {index} of 你好 🙂" for index in range(200)]
    results: dict[int, list[str]] = {}

    def work(thread: int) -> None:
        results[thread] = [tokenizer.decode(tokenizer.encode(text)) for text in texts]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[index] == texts for index in range(8))


def test_a_missing_or_broken_tokenizer_is_named_in_one_line(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be read") as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"legacy": False}, {"legacy": None}])
def test_llamas_own_class_is_as_transformers_builds_it(tmp_path, sentencepiece, model_type, options):
    (tmp_path / "tokenizer.json").write_bytes((sentencepiece / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | options))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat", " the", f"the{EOS}{BOS}the {EOS} the", f"{SPACE}a  b", "Größe 你"):
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_unigram_as_transformers_has_long_saved_it(tmp_path, scheme):
    pieces = ["<unk>", EOS, SPACE, f"{SPACE}the", f"{SPACE}b", *"abcdeht", "你"]
    backend = Backend(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    backend.add_special_tokens([EOS])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the abc the", "a 你 b", f"the{EOS} the", "b  b"):
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
        deltas, rest = stream(ours, token_ids)
        assert "".join(deltas) + rest == ours.decode(token_ids)


def test_an_unknown_decoder_is_refused_by_name(tmp_path):
    backend = Backend(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordPiece is not supported"):
        Tokenizer.from_dir(tmp_path)
