"""What tells models apart: the weights that are loaded, and nothing beside them."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_tiny_llama

from ensemble.config import ModelConfig
from ensemble.models.fingerprint import fingerprint
from ensemble.models.spec import load_model_spec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


def of(path: Path) -> str:
    return fingerprint(load_model_spec(path), ModelConfig(path=path))


def change(file: Path) -> None:
    """A bit of its last byte: a weight's."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_is_not_loaded_does_not_count(model: Path, tmp_path: Path) -> None:
    before = of(model)
    for name in ("pytorch_model.bin", "training_args.bin", "model.fp16.safetensors", "adapter_model.safetensors"):
        (model / name).write_bytes(b"other weights")
    assert of(model) == before
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    assert of(elsewhere) == before


def test_what_is_loaded_counts(model: Path) -> None:
    before = of(model)
    change(model / "model.safetensors")
    assert of(model) != before


def test_of_several_files_those_that_the_index_names(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = of(model)
    (model / "model-00002-of-00002.safetensors").write_bytes(b"of another version")
    assert of(model) == before
    change(model / "model-00001-of-00001.safetensors")
    assert of(model) != before
