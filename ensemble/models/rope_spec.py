"""What config.json says of rotary positions.

transformers 4 writes `rope_theta` beside `rope_scaling`, 5 writes both into `rope_parameters`. Where both are there
`rope_scaling` counts, as in transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. `factor` is of every scaling; what follows, of those that its comment names."""

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_positions: int = 8192  # dynamic, yarn, llama3: tokens of the context before it was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: turns over the original context above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which it is divided by `factor`
    is_truncated: bool = True  # yarn: whether the borders between the two are whole pairs
    attention_factor: float = 1.0  # yarn: by which cosines and sines are multiplied

    def max_model_len(
        self,
        max_positions: int,  # config.json's max_position_embeddings
    ) -> int:
        """Tokens of a sequence: linear and dynamic scaling stretch `max_positions`, yarn the original context."""
        if self.rope_type in ("linear", "dynamic"):
            return int(max_positions * self.factor)
        if self.rope_type == "yarn":
            return max(max_positions, int(self.original_max_positions * self.factor))
        return max_positions


def parse_rope(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """Raises ValueError for a scaling that is not supported, KeyError for a field that it lacks."""
    scaling = {k: v for k, v in _scaling(config).items() if v is not None}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in get_args(RopeType):
        raise ValueError(f"rope scaling {rope_type} is not supported; supported: {', '.join(get_args(RopeType))}")
    for name, value in scaling.items():
        if isinstance(value, dict):
            raise ValueError(f"rope scaling of its own for {name} layers is not supported")
    rope = RopeSpec(theta=theta, rope_type=cast(RopeType, rope_type))
    if rope_type == "default":
        return rope
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    fields: dict[str, Any] = {"original_max_positions": int(original or max_positions)}
    if rope_type == "dynamic":
        fields = {"original_max_positions": max_positions}
    if rope_type == "llama3":
        fields |= {name: float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor")}
    if rope_type == "yarn" and original and "factor" not in scaling:
        scaling["factor"] = max_positions / int(original)
    factor = fields["factor"] = float(scaling["factor"])
    if factor < 1:
        raise ValueError(f"rope scaling {rope_type}: factor = {factor} is not valid: at least 1")
    if rope_type == "yarn":
        fields |= {
            "beta_fast": float(scaling.get("beta_fast") or 32),
            "beta_slow": float(scaling.get("beta_slow") or 1),
            "is_truncated": bool(scaling.get("truncate", True)),
            "attention_factor": _yarn_attention_factor(scaling, factor),
        }
    return RopeSpec(theta=rope.theta, rope_type=rope.rope_type, **fields)


def partial_rotary_factor(config: Mapping[str, Any]) -> float:
    """The part of a head that is rotated."""
    return float(_scaling(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
