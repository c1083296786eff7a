"""What config.json says of positions, against transformers' own reading of the same file."""

import json

import pytest
import torch
from test_spec import LLAMA_2_7B

from ensemble.errors import ModelError
from ensemble.models.rope import inverse_frequencies
from ensemble.models.spec import load_model_spec
from kernels.rope import rotary_table

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "null": {"rope_type": None},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "old-name": {"type": "linear", "factor": 2},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-of-its-own-length": {"rope_type": "yarn", "factor": 2.0},
    "yarn-without-factor": YARN | {"factor": None},
    "yarn-factors": YARN | {"attention_factor": 1.3, "beta_fast": 64, "beta_slow": 2, "truncate": False},
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn-nulls": YARN | {"attention_factor": None, "beta_fast": None, "beta_slow": None},
}


def write(path, **changes):
    (path / "config.json").write_text(json.dumps(LLAMA_2_7B | changes))
    return path


def check_against_transformers(path):
    """The table of angles, of sequences as long as the positions that are asked for."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spec = load_model_spec(path)
    assert spec.rope is not None
    max_positions = min(spec.max_model_len, 5000)
    inv_freq = inverse_frequencies(spec.rope, spec.head_dim, max_positions)
    table = rotary_table(inv_freq, max_positions, spec.rope.attention_factor)
    for position in (0, 1, 1023, 1024, 2047, max_positions - 1):
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(path))
        cos, sin = theirs(torch.zeros(1), torch.tensor([[position]]))
        expected = torch.cat([part[0, 0, : spec.head_dim // 2] for part in (cos, sin)])
        # an angle of some thousand radians in fp32 is right to 2e-4
        torch.testing.assert_close(table[position], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_are_those_of_transformers(tmp_path, kind, form):
    scaling, theta = SCALINGS[kind], {"rope_theta": 500000.0}
    if kind == "null" and form == "rope_parameters":
        scaling = {}
    both = {form: scaling | theta} if form == "rope_parameters" else {form: scaling} | theta
    path = write(tmp_path, **both)
    if kind == "null" and form == "rope_scaling":  # which transformers itself does not read
        assert load_model_spec(path).rope == load_model_spec(write(tmp_path, **theta)).rope
        return
    check_against_transformers(path)


def test_rope_scaling_counts_where_both_forms_are_there(tmp_path):
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    check_against_transformers(write(tmp_path, rope_scaling=LLAMA3, rope_theta=500000.0, rope_parameters=parameters))
    check_against_transformers(write(tmp_path, rope_scaling=None, rope_parameters=parameters))


def test_the_original_length_may_stand_at_the_top(tmp_path):
    scaling = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    check_against_transformers(write(tmp_path, rope_scaling=scaling, original_max_position_embeddings=512))


@pytest.mark.parametrize(
    ("scaling", "max_model_len"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"type": "dynamic", "factor": 2.5}, 10240),
        (LLAMA3, 4096),  # whose max_position_embeddings is the stretched length
        (YARN | {"factor": 16.0}, 16384),
        (YARN | {"factor": 4.0}, 4096),
        ({"type": "yarn", "factor": 2.0}, 8192),
    ],
)
def test_scaling_stretches_the_length(tmp_path, scaling, max_model_len):
    assert load_model_spec(write(tmp_path, rope_scaling=scaling)).max_model_len == max_model_len


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope scaling su is not supported; supported: default, lin"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling longrope is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5 is not valid"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "field low_freq_factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention layers is not supported"),
        ({"rope_scaling": "linear"}, "config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ModelError) as error:
        load_model_spec(write(tmp_path, **change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
