"""What a model directory says, and the one line an operator gets when it cannot be served."""

import json

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_opt

from ensemble.errors import ModelError
from ensemble.models.llama import inverse_frequencies
from ensemble.models.spec import RopeSpec, load_model_spec

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
OPT_350M = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}


def write(path, config, **generation_config):
    (path / "config.json").write_text(json.dumps(config))
    if generation_config:
        (path / "generation_config.json").write_text(json.dumps(generation_config))
    return path


def test_published_llama_config(tmp_path):
    spec = load_model_spec(write(tmp_path, LLAMA_2_7B))
    assert (spec.architecture, spec.num_layers, spec.num_kv_heads, spec.head_dim) == ("llama", 32, 32, 128)
    assert (spec.max_model_len, spec.norm_eps, spec.dtype) == (4096, 1e-5, torch.float16)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, frozenset([2]))
    assert spec.rope == RopeSpec(theta=10000.0)
    assert not spec.tie_word_embeddings and not spec.attention_bias


def test_published_opt_config(tmp_path):
    spec = load_model_spec(write(tmp_path, OPT_350M))
    assert (spec.architecture, spec.embedding_size, spec.hidden_size) == ("opt", 512, 1024)
    assert (spec.is_pre_norm, spec.tie_word_embeddings, spec.attention_bias) == (False, True, True)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_model_len) == (16, 64, 2048)


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_dtype_is_read_in_either_form(tmp_path, field, written):
    config = {name: value for name, value in LLAMA_2_7B.items() if name != "torch_dtype"}
    assert load_model_spec(write(tmp_path, config | {field: written})).dtype == torch.bfloat16
    assert load_model_spec(write(tmp_path, config)).dtype == torch.float32


def test_rope_theta_is_read_in_either_form(tmp_path):
    expected = RopeSpec(theta=500000.0)
    assert load_model_spec(write(tmp_path, LLAMA_2_7B | {"rope_theta": 500000.0})).rope == expected
    parameters = {"rope_type": "default", "rope_theta": 500000.0}
    assert load_model_spec(write(tmp_path, LLAMA_2_7B | {"rope_parameters": parameters})).rope == expected


def test_biases_and_wide_heads_are_read(tmp_path):
    config = LLAMA_2_7B | {"attention_bias": True, "mlp_bias": True, "head_dim": 256, "num_key_value_heads": 8}
    spec = load_model_spec(write(tmp_path, config))
    assert (spec.attention_bias, spec.mlp_bias, spec.head_dim, spec.num_kv_heads) == (True, True, 256, 8)


@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_frequencies_are_those_of_transformers(tmp_path, rope, kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = 8.0
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    theta = {"rope_theta": 500000.0}
    config = LLAMA_2_7B | ({rope: scaling | theta} if rope == "rope_parameters" else {rope: scaling} | theta)
    path = write(tmp_path, config)
    spec = load_model_spec(path)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(path)).inv_freq
    torch.testing.assert_close(inverse_frequencies(spec.rope, spec.head_dim), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
def test_checkpoints_of_the_installed_transformers_are_read(tmp_path, make):
    spec = load_model_spec(make(tmp_path))
    assert (spec.vocab_size, spec.num_layers, spec.head_dim, spec.eos_token_ids) == (384, 2, 16, frozenset([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "t5"}, "model_type t5"),
        ({"sliding_window": 4096}, "sliding_window is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling yarn is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling dynamic is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling longrope is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"torch_dtype": "int8"}, "dtype int8 is not supported"),
        ({"num_key_value_heads": 5}, "32 heads are not a multiple of 5 KV heads"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ModelError) as error:
        load_model_spec(write(tmp_path, LLAMA_2_7B | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = false is not supported"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is not supported"),
        ({"activation_function": "swish"}, "activation_function swish is not supported"),
    ],
)
def test_opt_variants_that_are_not_supported_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ModelError) as error:
        load_model_spec(write(tmp_path, OPT_350M | change))
    assert message in str(error.value)


def test_a_missing_field_is_named(tmp_path):
    config = {name: value for name, value in LLAMA_2_7B.items() if name != "num_hidden_layers"}
    with pytest.raises(ModelError, match="field num_hidden_layers is missing"):
        load_model_spec(write(tmp_path, config))


def test_a_path_that_is_no_model_is_named_in_one_line(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        load_model_spec(tmp_path / "absent")
    with pytest.raises(ModelError, match="has no config"):
        load_model_spec(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json: ") as error:
            load_model_spec(tmp_path)
        assert "\n" not in str(error.value)
