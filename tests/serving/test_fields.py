"""The names of the interface: where a value may come from, what it may look like, and what a wrong one is told."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble.errors import InvalidRequest
from ensemble.serving.client_request import choice_seed
from ensemble.serving.fields import (
    ALIASES,
    INTERNAL,
    KINDS,
    NEUTRAL,
    OF_THE_SERVER,
    ONLY_NULL,
    OTHERS,
    SAMPLING,
    Kind,
    collect,
)
from ensemble.serving.inputs import parse_options
from ensemble.serving.limits import ModelLimits
from ensemble.serving.sampling_inputs import parse_sampling
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import EOS_ID, make_tiny_tokenizer

REPOSITORY = Path(__file__).parents[2] / "model_repository"
LIMITS = ModelLimits(vocab_size=384, max_model_len=512, eos_token_ids=frozenset([EOS_ID]), max_token_bytes=16)
DTYPES = {
    Kind.INT: {"INT32", "UINT64"},
    Kind.FLOAT: {"FP32"},
    Kind.BOOL: {"BOOL"},
    Kind.TEXT: {"STRING"},
    Kind.TEXTS: {"STRING"},
    Kind.INTS: {"INT32"},
    Kind.FLOATS: {"FP32"},
    Kind.OBJECT: {"STRING"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return Tokenizer.from_dir(path)


def declared(model: str) -> dict[str, str]:
    """Inputs of a model's configuration: name |-> data type."""
    inputs = (REPOSITORY / model / "config.pbtxt").read_text().partition("output [")[0]
    return dict(re.findall(r'\{ name: "(\w+)" data_type: TYPE_(\w+)', inputs))


@pytest.mark.parametrize("model", ["scheduler", "ensemble", "vllm_model"])
def test_what_is_declared_is_known_and_of_its_type(model: str) -> None:
    for name, dtype in declared(model).items():
        assert dtype in DTYPES[KINDS[name]], name
    missing = {*SAMPLING, *OTHERS} - {"best_of"} - declared(model).keys()
    if model == "scheduler":
        assert not missing
    else:
        assert missing == {"input_ids", "return_output_ids", "logprobs", *INTERNAL}


def test_a_tensor_goes_before_sampling_parameters_and_those_before_parameters() -> None:
    tensors = {
        "temperature": np.array([[0.5]], np.float32),
        "sampling_parameters": np.array([b'{"temperature": "2", "top_k": "7", "seed": null}'], object),
    }
    values = collect(tensors, {"top_k": 9, "temperature": 3, "seed": "5", "stop": "x", "max_new_tokens": "4"})
    assert values == {"temperature": 0.5, "top_k": 7, "seed": 5, "stop_words": ["x"], "max_tokens": 4}


@pytest.mark.parametrize("none", ["", [""], [], ["", ""], [[""]]])
@pytest.mark.parametrize("name", ["stop_words", "bad_words", "stop", "embedding_bias_words"])
def test_every_form_of_no_words(name: str, none: Any) -> None:
    assert collect({name: np.array(none, object)}, {}) == {ALIASES.get(name, name): []}
    if isinstance(none, str):
        assert collect({}, {name: none}) == {ALIASES.get(name, name): []}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_tokns": 1}, "max_tokns = 1 .* did you mean max_tokens?"),
        ({"Temperature": 1}, "Temperature = 1 .* did you mean temperature?"),
        ({"x" * 100_000: 1}, "there is no input of this name$"),
        ({"return_cancel_handle": True}, "there is no input of this name"),
        ({"beam_width": 2}, "beam_width = 2 .* only 1 is served"),
        ({"use_beam_search": "true"}, "use_beam_search = True .* only false"),
        ({"skip_special_tokens": False}, "skip_special_tokens = False .* only true"),
        ({"max_tokens": "many"}, "max_tokens = 'many' .* an integer"),
        ({"max_tokens": True}, "max_tokens = True .* an integer"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5 .* an integer"),
        ({"stream": 1}, "stream = 1 .* true or false"),
        ({"stop_token_ids": "[1, [2]]"}, r"stop_token_ids\[1\] = \[2\] .* an integer"),
        ({"max_new_tokens": 3, "max_tokens": 4}, "max_new_tokens = 3 .* max_tokens is given as 4"),
        ({"sampling_parameters": "[1]"}, r"sampling_parameters = \[1\] .* a JSON object"),
        ({"sampling_parameters": '{"a'}, "sampling_parameters = .* JSON"),
        ({"sampling_parameters": '{"tempurature": 1}'}, "did you mean sampling_parameters.temperature?"),
        ({"sampling_parameters": '{"text_input": "x"}'}, "sampling_parameters.text_input = 'x'"),
        ({"sampling_parameters": '{"prompt_logprobs": 1}'}, "sampling_parameters.prompt_logprobs = 1 .* not served"),
        ({"sampling_parameters": "[" * 100_000}, "sampling_parameters = .* JSON"),
        ({"max_tokens": "9" * 5000}, "max_tokens = .* an integer"),
    ],
)
def test_what_is_refused_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        collect({}, parameters)


@pytest.mark.parametrize("name", ["input_ids", "return_output_ids"])
def test_what_only_the_scheduler_has_is_refused_by_the_ensembles(name: str) -> None:
    collect({}, {name: "1" if name == "input_ids" else True})
    with pytest.raises(InvalidRequest, match=f"{name} = .* there is no input of this name"):
        collect({"ensemble_mark": np.array([b"x"], object)}, {name: "1"})


def test_a_number_that_equals_nothing_is_no_other_value_of_its_name() -> None:
    assert np.isnan(collect({"temperature": np.array([np.nan], np.float32)}, {})["temperature"])


def test_what_has_no_effect_is_taken() -> None:
    neutral = {name: "1" if allowed is None else allowed[0] for name, (_, allowed) in NEUTRAL.items()}
    assert set(collect({}, neutral)) == set(neutral)
    nulls = json.dumps(dict.fromkeys([*ONLY_NULL, "max_tokens"]))
    assert collect({}, {"sampling_parameters": nulls}) == {}


@pytest.mark.parametrize("name", ["id", "sequence_id", "timeout", "triton_enable_empty_final_response"])
def test_parameters_of_the_server_are_not_the_clients(name: str) -> None:
    assert OF_THE_SERVER.fullmatch(name)


def sampling_of(tokenizer: Tokenizer, **values: Any) -> Any:
    collected = collect({}, values)
    return parse_sampling(collected, parse_options(collected), tokenizer, LIMITS)


def test_end_id(tokenizer: Tokenizer) -> None:
    assert not sampling_of(tokenizer, end_id=EOS_ID).ignore_eos
    assert sampling_of(tokenizer, end_id=-1).ignore_eos
    other = sampling_of(tokenizer, end_id=9, stop_token_ids="[4]")
    assert (other.ignore_eos, other.stop_token_ids) == (True, (4, 9))
    with pytest.raises(InvalidRequest, match="token ids from 0 to 383"):
        sampling_of(tokenizer, end_id=384)


@pytest.mark.parametrize(
    ("asked", "top_k", "top_p"),
    [
        ({"top_p": 0}, 1, 1.0),  # OpenAI's and TensorRT-LLM's: the likeliest token alone
        ({"top_p": 0.0, "top_k": 0}, 1, 1.0),
        ({"top_p": 0, "top_k": 50}, 50, 1.0),  # TensorRT-LLM's: by top_k alone
        ({"top_p": 0.5, "top_k": -1}, 0, 0.5),
    ],
)
def test_top_p_of_zero(tokenizer: Tokenizer, asked: dict[str, Any], top_k: int, top_p: float) -> None:
    sampling = sampling_of(tokenizer, **asked)
    assert (sampling.top_k, sampling.top_p) == (top_k, top_p)


def test_biases_by_id_and_by_word(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("Seine", add_special_tokens=False)
    words = {"embedding_bias_words": ["Seine"], "embedding_bias_weights": [1.5]}
    bias = sampling_of(tokenizer, logit_bias={"5": -100, str(token_ids[0]): 1}, **words).logit_bias
    expected = {5: -100.0, token_ids[0]: 1.0}
    for token_id in token_ids:
        expected[token_id] = expected.get(token_id, 0.0) + 1.5
    assert bias == expected
    for bad in ({"384": 1}, {"x": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"5": None}, {"5": True}):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            sampling_of(tokenizer, logit_bias=bad)
    with pytest.raises(InvalidRequest, match="embedding_bias_weights"):
        sampling_of(tokenizer, embedding_bias_words=["Seine"])


def test_bad_words_at_the_start_and_after_a_space(tokenizer: Tokenizer) -> None:
    words = sampling_of(tokenizer, bad_words=["is", "Paris"]).bad_words
    for text in ("is", " is", "Paris"):
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) in words


def test_the_first_choice_has_the_requests_seed_and_others_their_own() -> None:
    seeds = [choice_seed(7, choice) for choice in range(16)] + [choice_seed(8, choice) for choice in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 32
    assert all(0 <= seed < 1 << 64 for seed in seeds)
