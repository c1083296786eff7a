"""`ModelSpec`: what a Hugging Face model directory says about its model, checked, in our words.

Sources: the configuration classes of transformers, as releases 4 and 5 write their fields. A field that is null or
left out has the class's default, but for those that say how large the model is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ensemble.errors import ModelError
from ensemble.models.end_tokens import read_end_token_ids
from ensemble.models.model_files import what_it_is
from ensemble.models.rope_spec import RopeSpec, parse_rope, partial_rotary_factor

Architecture = Literal["llama", "opt"]
Activation = Literal["relu", "gelu", "gelu_tanh"]  # those of kernels.activation
DType = Literal["float16", "bfloat16", "float32", "float64"]  # by torch's name: processes without a model have no torch
DTYPE_BYTES: dict[DType, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# model_type |-> what transformers assumes of fields that config.json leaves out
_LLAMA_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "OPTForCausalLM": "opt",
}
_OPT_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_OPT_LAYER_NORM_EPS = 1e-5  # transformers leaves it at torch's default; it is not in config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model. Fields after `pad_token_id` are of one architecture; the other leaves them at their defaults."""

    path: Path
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int  # tokens of a sequence, by the model's position embedding
    norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # of the projections to queries, keys and values
    attention_output_bias: bool
    mlp_bias: bool
    dtype: DType  # of the checkpoint
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    pad_token_id: int | None
    rope: RopeSpec | None = None  # llama
    has_head_norms: bool = False  # llama: RMSNorm of each query and key head, as in Qwen3
    windows: tuple[int | None, ...] = ()  # llama: for each layer, how many tokens a token sees, itself among them
    activation: Activation = "relu"  # opt
    embedding_size: int = 0  # opt: word_embed_proj_dim; differs from hidden_size where the model projects
    is_pre_norm: bool = True  # opt: do_layer_norm_before


def dtype_of(spec: ModelSpec, configured: DType | Literal["auto"], device_type: str) -> DType:
    """What the model runs in: as configured; `auto` is float32 on a CPU and the checkpoint's on a GPU."""
    if configured != "auto":
        return configured
    return "float32" if device_type == "cpu" else spec.dtype


def load_model_spec(path: str | Path) -> ModelSpec:
    """Reads config.json, generation_config.json where there is one, and the tokenizer's end token.

    Raises ModelError in one line.
    """
    path = Path(path)
    try:
        if not path.is_dir() or not (path / "config.json").exists():
            raise ModelError(f"model path {path}: {what_it_is(path)}")
    except OSError as error:  # a folder that may not be looked into
        raise ModelError(f"model path {path}: {error.strerror}") from None
    config = _read_json(path / "config.json")
    generation_config = _read_json(path / "generation_config.json", required=False)
    try:
        return _parse(path, config, generation_config)
    except KeyError as error:
        raise ModelError(f"{path / 'config.json'}: field {error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path / 'config.json'}: {' '.join(str(error).split())}") from None


def _parse(path: Path, config: dict[str, Any], generation_config: dict[str, Any]) -> ModelSpec:
    model_type = _model_type(path, config)
    config = _LLAMA_FAMILY.get(model_type, {}) | config
    _refuse_features(path, config)
    common: dict[str, Any] = {
        "path": path,
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": _size(config, "hidden_size"),
        "num_layers": _size(config, "num_hidden_layers"),
        "num_heads": _size(config, "num_attention_heads"),
        "dtype": _parse_dtype(config) or _stored_dtype(path),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": read_end_token_ids(path, config, generation_config, int(config["vocab_size"])),
        "pad_token_id": config.get("pad_token_id"),
    }
    if common["hidden_size"] % common["num_heads"] and not config.get("head_dim"):
        raise ValueError(f"hidden_size {common['hidden_size']} is not a multiple of {common['num_heads']} heads")
    spec = _parse_opt(config, common) if model_type == "opt" else _parse_llama(model_type, config, common)
    if spec.num_heads % spec.num_kv_heads:
        raise ValueError(f"{spec.num_heads} heads are not a multiple of {spec.num_kv_heads} KV heads")
    return spec


def _model_type(path: Path, config: Mapping[str, Any]) -> str:
    """By the architecture, which old LLaMA checkpoints write LLaMAForCausalLM; where none is named, by `model_type`."""
    written = config.get("architectures") or []
    names = [written] if isinstance(written, str) else [str(name) for name in written]
    known = {architecture.lower(): model_type for architecture, model_type in _MODEL_TYPES.items()}
    found = next((known[name.lower()] for name in names if name.lower() in known), None)
    if found is None and not names and config.get("model_type") in known.values():
        found = str(config["model_type"])
    if found is None:
        named = ", ".join(names) or f"none (model_type {config.get('model_type')})"
        raise ModelError(f"model {path}: architecture {named} is not supported; supported: {', '.join(_MODEL_TYPES)}")
    return found


def _parse_llama(model_type: str, config: Mapping[str, Any], common: dict[str, Any]) -> ModelSpec:
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation} is not supported; supported: silu")
    max_positions = int(config["max_position_embeddings"] or _LLAMA_FAMILY[model_type]["max_position_embeddings"])
    rope = parse_rope(config, max_positions)
    has_bias = bool(config.get("attention_bias")) and model_type in ("llama", "qwen3")
    return ModelSpec(
        **common,
        architecture="llama",
        intermediate_size=_size(config, "intermediate_size"),
        num_kv_heads=int(config.get("num_key_value_heads") or common["num_heads"]),
        head_dim=int(config.get("head_dim") or common["hidden_size"] // common["num_heads"]),
        max_model_len=rope.max_model_len(max_positions),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        attention_bias=has_bias or model_type == "qwen2",
        attention_output_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias")) and model_type == "llama",
        rope=rope,
        has_head_norms=model_type == "qwen3",
        windows=_parse_windows(model_type, config, common["num_layers"]),
    )


def _parse_windows(model_type: str, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Of layers that `layer_types` names; without it Mistral's is of all layers, Qwen's of those after the first."""
    window = config.get("sliding_window")
    if model_type == "llama" or window is None or (model_type != "mistral" and not config.get("use_sliding_window")):
        return (None,) * num_layers
    if int(window) < 1:
        raise ValueError(f"sliding_window = {window} is not valid: at least 1, or null")
    kinds = config.get("layer_types")
    if kinds is None and model_type == "mistral":
        return (int(window),) * num_layers
    if kinds is None:
        num_full = 28 if config.get("max_window_layers") is None else int(config["max_window_layers"])
        return tuple(int(window) if layer >= num_full else None for layer in range(num_layers))
    if len(kinds) != num_layers or not {*kinds} <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types is not valid: full_attention or sliding_attention for each of {num_layers}")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _parse_opt(config: Mapping[str, Any], common: dict[str, Any]) -> ModelSpec:
    activation = config.get("activation_function") or "relu"
    if activation not in _OPT_ACTIVATIONS:
        raise ValueError(f"activation_function {activation} is not supported; supported: {', '.join(_OPT_ACTIVATIONS)}")
    has_bias = _is_on(config, "enable_bias")
    return ModelSpec(
        **common,
        architecture="opt",
        intermediate_size=_size(config, "ffn_dim"),
        num_kv_heads=common["num_heads"],
        head_dim=common["hidden_size"] // common["num_heads"],
        max_model_len=int(config.get("max_position_embeddings") or 2048),
        norm_eps=_OPT_LAYER_NORM_EPS,
        tie_word_embeddings=_is_on(config, "tie_word_embeddings"),
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        mlp_bias=has_bias,
        activation=_OPT_ACTIVATIONS[activation],
        embedding_size=int(config.get("word_embed_proj_dim") or common["hidden_size"]),
        is_pre_norm=_is_on(config, "do_layer_norm_before"),
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if size is None:
        raise KeyError(name)
    if int(size) < 1:
        raise ValueError(f"{name} = {size} is not valid: at least 1")
    return int(size)


def _is_on(config: Mapping[str, Any], name: str) -> bool:
    """Of a field that is true by default."""
    value = config.get(name)
    return True if value is None else bool(value)


def _parse_dtype(config: Mapping[str, Any]) -> DType | None:
    named = config.get("dtype") or config.get("torch_dtype")
    if named in (None, "auto"):
        return None
    return _checked_dtype(str(named).removeprefix("torch."))


def _stored_dtype(path: Path) -> DType:
    from ensemble.models.checkpoint import stored_dtype  # it takes torch, which config.json nearly always spares

    return _checked_dtype(stored_dtype(path) or "float32")


def _checked_dtype(name: str) -> DType:
    if name not in get_args(DType):
        raise ValueError(f"dtype {name} is not supported; supported: {', '.join(get_args(DType))}")
    return cast(DType, name)


def _refuse_features(path: Path, config: Mapping[str, Any]) -> None:
    unsupported = {
        "quantization_config": config.get("quantization_config"),
        "partial_rotary_factor": partial_rotary_factor(config) != 1.0,
        "layer_norm_elementwise_affine = false": not _is_on(config, "layer_norm_elementwise_affine"),
        "_remove_final_layer_norm": config.get("_remove_final_layer_norm"),
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise ModelError(f"model {path}: {feature} is not supported")


def _read_json(file: Path, required: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelError(f"model path {file.parent}: has no {file.name}") from None
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return cast(dict[str, Any], content)
