"""Deployments for the tests."""

from pathlib import Path
from typing import Any

from ensemble.config import Deployment


def deploy(path: Path, **changes: Any) -> Deployment:
    """A deployment on the CPU in float64, with small pools; `changes` replace top-level fields or parts of them."""
    raw: dict[str, Any] = {
        "model": {"path": path, "dtype": "float64"},
        "prefill": {"devices": ["cpu"], "kv_cache_bytes": 32 << 20},
        "decode": {"devices": ["cpu"], "kv_cache_bytes": 32 << 20},
    }
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    return Deployment.parse(raw)
