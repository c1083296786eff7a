"""Published models' shapes, which the engine's benchmarks fill with dummy weights, and their goals."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.models.spec import ModelSpec, load_model_spec

LLAMA_2 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 4096}
OPT = {"architectures": ["OPTForCausalLM"], "vocab_size": 50272, "max_position_embeddings": 2048}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A published model's config.json, and goals: decode by batch size as a multiple of the floor at a mean context of
    544; prefill of one prompt by its length, in milliseconds and as a multiple of the floor; mixed steps by chunk and
    decode rows, in milliseconds.
    """

    config: dict[str, Any]
    decode_goals: dict[int, float] = field(default_factory=dict)
    prefill_goals_ms: dict[int, float] = field(default_factory=dict)
    prefill_goals: dict[int, float] = field(default_factory=dict)
    mixed_goals_ms: dict[tuple[int, int], float] = field(default_factory=dict)


SHAPES = {
    "LLaMA-2-7B": Shape(
        config=LLAMA_2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-5,
        },
        decode_goals={1: 1.18, 8: 1.18, 32: 1.14, 64: 1.12, 128: 1.10},
        prefill_goals_ms={512: 14, 1024: 24},
        prefill_goals={2048: 1.26},
    ),
    "LLaMA-2-13B": Shape(
        config=LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "rms_norm_eps": 1e-5,
        },
        prefill_goals={2048: 1.26},
        mixed_goals_ms={(512, 2): 23.5, (512, 8): 27, (256, 2): 14, (256, 8): 17.5},
    ),
    "OPT-13B": Shape(
        config=OPT | {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
        decode_goals={1: 1.14, 8: 1.14, 32: 1.11, 64: 1.09},
        prefill_goals_ms={512: 26, 1024: 46},
    ),
    "LLaMA-3-8B": Shape(
        config={
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "max_position_embeddings": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
    ),
}


def load_spec(config: dict[str, Any]) -> ModelSpec:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_model_spec(directory)
