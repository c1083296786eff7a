"""What a model directory says, and the one line an operator gets when it cannot be served."""

import json

import pytest
from checkpoints import make_tiny_llama, make_tiny_mistral, make_tiny_opt, make_tiny_qwen2, make_tiny_qwen3

from ensemble.errors import ModelError
from ensemble.models.rope_spec import RopeSpec
from ensemble.models.spec import load_model_spec

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
    assert (spec.max_model_len, spec.norm_eps, spec.dtype) == (4096, 1e-5, "float16")
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
    assert load_model_spec(write(tmp_path, config | {field: written})).dtype == "bfloat16"
    for none in ({}, {field: None}, {field: "auto"}):  # and no weights to say it
        assert load_model_spec(write(tmp_path, config | none)).dtype == "float32"


def test_rope_theta_is_read_in_either_form(tmp_path):
    expected = RopeSpec(theta=500000.0)
    assert load_model_spec(write(tmp_path, LLAMA_2_7B | {"rope_theta": 500000.0})).rope == expected
    parameters = {"rope_type": "default", "rope_theta": 500000.0}
    assert load_model_spec(write(tmp_path, LLAMA_2_7B | {"rope_parameters": parameters})).rope == expected


def test_biases_and_wide_heads_are_read(tmp_path):
    config = LLAMA_2_7B | {"attention_bias": True, "mlp_bias": True, "head_dim": 256, "num_key_value_heads": 8}
    spec = load_model_spec(write(tmp_path, config))
    assert (spec.attention_bias, spec.mlp_bias, spec.head_dim, spec.num_kv_heads) == (True, True, 256, 8)


MISTRAL = LLAMA_2_7B | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
QWEN2 = LLAMA_2_7B | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 4096}
QWEN3 = LLAMA_2_7B | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 4096}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def test_mistral(tmp_path):
    spec = load_model_spec(write(tmp_path, MISTRAL))
    assert (spec.architecture, spec.attention_bias, spec.has_head_norms) == ("llama", False, False)
    assert spec.windows == (4096,) * 32
    assert load_model_spec(write(tmp_path, without(MISTRAL, "sliding_window"))).windows == (4096,) * 32
    assert load_model_spec(write(tmp_path, MISTRAL | {"sliding_window": None})).windows == (None,) * 32
    kinds = ["full_attention", "sliding_attention"] * 16  # Ministral 8B's, which transformers reads as `ministral`
    assert load_model_spec(write(tmp_path, MISTRAL | {"layer_types": kinds})).windows == (None, 4096) * 16


def test_qwen2(tmp_path):
    spec = load_model_spec(write(tmp_path, QWEN2))
    assert (spec.attention_bias, spec.attention_output_bias, spec.mlp_bias) == (True, False, False)
    assert spec.windows == (None,) * 32
    windowed = QWEN2 | {"use_sliding_window": True, "max_window_layers": 30}
    assert load_model_spec(write(tmp_path, windowed)).windows == (None,) * 30 + (4096,) * 2
    kinds = ["sliding_attention", "full_attention"] * 16
    assert load_model_spec(write(tmp_path, windowed | {"layer_types": kinds})).windows == (4096, None) * 16
    with pytest.raises(ModelError, match="layer_types"):
        load_model_spec(write(tmp_path, windowed | {"layer_types": kinds[1:]}))


def test_qwen3(tmp_path):
    spec = load_model_spec(write(tmp_path, QWEN3))
    assert (spec.has_head_norms, spec.attention_bias, spec.head_dim) == (True, False, 128)
    assert load_model_spec(write(tmp_path, QWEN3 | {"hidden_size": 1024})).head_dim == 128
    assert load_model_spec(write(tmp_path, QWEN3 | {"attention_bias": True})).attention_output_bias


@pytest.mark.parametrize("config", [LLAMA_2_7B, MISTRAL, QWEN2, QWEN3, OPT_350M])
def test_what_is_null_or_left_out_is_as_in_transformers(tmp_path, config):
    from transformers import AutoConfig

    optional = {*config} - {"hidden_size", "ffn_dim", "intermediate_size", "vocab_size", "model_type", "torch_dtype"}
    optional -= {name for name in config if name.startswith("num_") and "key_value" not in name}
    theirs = AutoConfig.from_pretrained(write(tmp_path, without(config, *optional)))
    assert_read_alike(load_model_spec(tmp_path), theirs)
    nulls = dict.fromkeys(optional - {"sliding_window", "num_key_value_heads"})
    assert_read_alike(load_model_spec(write(tmp_path, without(config, *optional) | nulls)), theirs)


def assert_read_alike(spec, theirs):
    assert spec.max_model_len == theirs.max_position_embeddings
    assert spec.tie_word_embeddings == theirs.tie_word_embeddings
    if spec.architecture == "opt":
        assert (spec.embedding_size, spec.is_pre_norm) == (theirs.word_embed_proj_dim, theirs.do_layer_norm_before)
        assert (spec.attention_bias, spec.activation) == (theirs.enable_bias, theirs.activation_function)
        return
    assert (spec.num_kv_heads, spec.norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert spec.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert spec.rope == RopeSpec(theta=theirs.rope_parameters["rope_theta"])
    assert set(spec.windows) == {getattr(theirs, "sliding_window", None)}


def test_a_missing_architecture_is_told_by_the_model_type(tmp_path):
    assert load_model_spec(write(tmp_path, QWEN3 | {"architectures": None})).has_head_norms
    assert (
        load_model_spec(write(tmp_path, LLAMA_2_7B | {"architectures": ["LLaMAForCausalLM"]})).architecture == "llama"
    )


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_mistral, make_tiny_qwen2, make_tiny_qwen3, make_tiny_opt])
def test_checkpoints_of_the_installed_transformers_are_read(tmp_path, make):
    spec = load_model_spec(make(tmp_path))
    head_dim = 32 if make is make_tiny_qwen3 else 16
    assert (spec.vocab_size, spec.num_layers, spec.head_dim, spec.eos_token_ids) == (384, 2, head_dim, frozenset([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "t5"}, "model_type t5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"torch_dtype": "int8"}, "dtype int8 is not supported"),
        ({"num_key_value_heads": 5}, "32 heads are not a multiple of 5 KV heads"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not valid"),
        ({"vocab_size": None}, "field vocab_size is missing"),
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty; a Hugging Face directory is needed"),
        (["README.md"], "has no config.json; a Hugging Face directory is needed"),
        (["model.safetensors"], "has no config.json"),
        (["nested/config.json"], "nested has one"),
        (["snapshots/0123/config.json"], "snapshots/0123 has one"),
        (["model-q4_0.gguf"], "holds a GGUF model, which llama.cpp reads (model-q4_0.gguf)"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter (LoRA) and not a model"),
        (["consolidated.00.pth", "params.json"], "in their maker's own format"),
        (["rank0.engine", "config.pbtxt"], "TensorRT engine"),
    ],
)
def test_a_directory_that_is_no_model_is_named_for_what_it_is(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(ModelError) as error:
        load_model_spec(tmp_path)
    assert str(error.value).startswith(f"model path {tmp_path}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_no_model_is_named_in_one_line(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        load_model_spec(tmp_path / "absent")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a GGUF file; a Hugging Face directory is needed"):
        load_model_spec(tmp_path / "model.gguf")
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json: ") as error:
            load_model_spec(tmp_path)
        assert "\n" not in str(error.value)
