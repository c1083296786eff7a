"""`ModelSpec`: what a Hugging Face model directory says about its model, checked, in our words.

Sources: the fields of transformers' LlamaConfig and OPTConfig, as releases 4 and 5 write them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ensemble.errors import ModelError
from ensemble.models.end_tokens import read_end_token_ids
from kernels.activation import Activation

Architecture = Literal["llama", "opt"]
RopeType = Literal["default", "linear", "llama3"]

_ARCHITECTURES: dict[str, Architecture] = {"LlamaForCausalLM": "llama", "OPTForCausalLM": "opt"}
_ROPE_TYPES = ("default", "linear", "llama3")
_OPT_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_OPT_LAYER_NORM_EPS = 1e-5  # transformers leaves it at torch's default; it is not in config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. `factor` is of `linear` and `llama3`, the rest of `llama3` (Llama 3.1's scaling)."""

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model. Fields after `rope` are of one architecture; the other leaves them at their defaults."""

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
    attention_bias: bool
    mlp_bias: bool
    dtype: torch.dtype  # of the checkpoint
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    pad_token_id: int | None
    rope: RopeSpec | None = None  # llama
    activation: Activation = "relu"  # opt
    embedding_size: int = 0  # opt: word_embed_proj_dim; differs from hidden_size where the model projects
    is_pre_norm: bool = True  # opt: do_layer_norm_before


def load_model_spec(path: str | Path) -> ModelSpec:
    """Reads config.json, generation_config.json where there is one, and the tokenizer's end token.

    Raises ModelError in one line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"model path {path}: no such directory")
    config = _read_json(path / "config.json")
    generation_config = _read_json(path / "generation_config.json", required=False)
    try:
        return _parse(path, config, generation_config)
    except KeyError as error:
        raise ModelError(f"{path / 'config.json'}: field {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'}: {' '.join(str(error).split())}") from None


def _parse(path: Path, config: dict[str, Any], generation_config: dict[str, Any]) -> ModelSpec:
    names = config.get("architectures") or []
    architecture = next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)
    if architecture is None:
        found = ", ".join(names) or f"none (model_type {config.get('model_type')})"
        raise ModelError(f"model {path}: architecture {found} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    _refuse_features(path, config)
    common: dict[str, Any] = {
        "path": path,
        "architecture": architecture,
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "num_layers": int(config["num_hidden_layers"]),
        "num_heads": int(config["num_attention_heads"]),
        "max_model_len": int(config["max_position_embeddings"]),
        "dtype": _parse_dtype(config),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": read_end_token_ids(path, config, generation_config, int(config["vocab_size"])),
        "pad_token_id": config.get("pad_token_id"),
    }
    if common["hidden_size"] % common["num_heads"] and not config.get("head_dim"):
        raise ValueError(f"hidden_size {common['hidden_size']} is not a multiple of {common['num_heads']} heads")
    spec = _parse_llama(config, common) if architecture == "llama" else _parse_opt(config, common)
    if spec.num_heads % spec.num_kv_heads:
        raise ValueError(f"{spec.num_heads} heads are not a multiple of {spec.num_kv_heads} KV heads")
    return spec


def _parse_llama(config: Mapping[str, Any], common: dict[str, Any]) -> ModelSpec:
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']} is not supported; supported: silu")
    return ModelSpec(
        **common,
        intermediate_size=int(config["intermediate_size"]),
        num_kv_heads=int(config.get("num_key_value_heads") or common["num_heads"]),
        head_dim=int(config.get("head_dim") or common["hidden_size"] // common["num_heads"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope=_parse_rope(config, common["max_model_len"]),
    )


def _parse_opt(config: Mapping[str, Any], common: dict[str, Any]) -> ModelSpec:
    activation = config.get("activation_function", "relu")
    if activation not in _OPT_ACTIVATIONS:
        raise ValueError(f"activation_function {activation} is not supported; supported: {', '.join(_OPT_ACTIVATIONS)}")
    has_bias = bool(config.get("enable_bias", True))
    return ModelSpec(
        **common,
        intermediate_size=int(config["ffn_dim"]),
        num_kv_heads=common["num_heads"],
        head_dim=common["hidden_size"] // common["num_heads"],
        norm_eps=_OPT_LAYER_NORM_EPS,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_bias=has_bias,
        mlp_bias=has_bias,
        activation=_OPT_ACTIVATIONS[activation],
        embedding_size=int(config.get("word_embed_proj_dim") or common["hidden_size"]),
        is_pre_norm=bool(config.get("do_layer_norm_before", True)),
    )


def _parse_rope(config: Mapping[str, Any], max_model_len: int) -> RopeSpec:
    """transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"rope scaling {rope_type} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if rope_type == "default":
        return RopeSpec(theta=theta)
    if rope_type == "linear":
        return RopeSpec(theta=theta, rope_type="linear", factor=float(scaling["factor"]))
    return RopeSpec(
        theta=theta,
        rope_type="llama3",
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_positions=int(scaling.get("original_max_position_embeddings", max_model_len)),
    )


def _parse_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name} is not supported; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _refuse_features(path: Path, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unsupported = {
        "sliding_window": config.get("sliding_window"),
        "quantization_config": config.get("quantization_config"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
        "layer_norm_elementwise_affine = false": not config.get("layer_norm_elementwise_affine", True),
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
