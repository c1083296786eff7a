"""Tells models apart whose KV must not be mixed up: by what config.json says and by the weights' files."""

import hashlib
from dataclasses import fields
from pathlib import Path

from ensemble.config import ModelConfig
from ensemble.models.model_files import weight_files
from ensemble.models.spec import ModelSpec

_SAMPLE_BYTES = 64 << 10  # of the beginning and of the end of each file: two trainings of one model have the same sizes


def fingerprint(spec: ModelSpec, config: ModelConfig) -> str:
    """The same on every host that has the same model, wherever it lies and whatever lies beside it; another one with
    other weights. Raises ModelError."""
    digest = hashlib.sha256()
    for field in fields(spec):
        if field.name != "path":
            value = getattr(spec, field.name)
            digest.update(f"{field.name}={sorted(value) if isinstance(value, frozenset) else value!r};".encode())
    if config.load_format == "dummy":
        digest.update(f"dummy, seed {config.seed}".encode())
    else:
        for file in weight_files(spec.path):
            digest.update(_sample(file))
    return digest.hexdigest()[:16]


def _sample(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        beginning = opened.read(_SAMPLE_BYTES)
        opened.seek(max(0, size - _SAMPLE_BYTES))
        return b"%d %b %b" % (size, beginning, opened.read())
