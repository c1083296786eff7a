"""Weights into a model: from safetensors, each tensor read once and straight to the device, or random.

Checkpoints of OPT exist with and without the prefixes `model.` and `decoder.`; names are compared without them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble.errors import ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


def load_weights(
    path: Path,  # a model directory
    named_weights: Iterable[tuple[str, Tensor]],  # checkpoint name |-> tensor to fill
    device: torch.device,
) -> None:
    """Fills every tensor. Raises ModelError naming the weight that is missing or has another shape."""
    key_of, file_of = _read_index(path)
    wanted: dict[str, list[tuple[str, Tensor]]] = {}  # file |-> (key, tensor) in it
    for name, tensor in named_weights:
        key = key_of.get(_without_prefixes(name))
        if key is None:
            raise ModelError(f"model {path}: weight {name} is missing")
        wanted.setdefault(file_of[key], []).append((key, tensor))
    for file, entries in wanted.items():
        try:
            with safe_open(path / file, framework="pt", device=str(device)) as checkpoint:
                for key, tensor in entries:
                    shape = tuple(checkpoint.get_slice(key).get_shape())
                    if shape != tuple(tensor.shape):
                        raise ModelError(
                            f"model {path}: weight {key} in {file} has shape {shape},"
                            f" config.json asks for {tuple(tensor.shape)}"
                        )
                    tensor.copy_(checkpoint.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {path}: {file} cannot be read: {' '.join(str(error).split())}") from None


def fill_with_random_weights(named_weights: Iterable[tuple[str, Tensor]], seed: int, device: torch.device) -> None:
    """Fills every tensor from N(0, 0.02), the weights of norms from N(1, 0.02).

    On one kind of device the values are a function of (seed, name) alone, so that two workers agree.
    """
    generator = torch.Generator(device)
    for name, tensor in named_weights:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        is_norm = tensor.ndim == 1 and "norm" in name and name.endswith(".weight")
        tensor.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns name without prefixes |-> key, and key |-> file."""
    try:
        if (path / _INDEX_FILE).exists():
            file_of = {str(key): str(file) for key, file in _read_weight_map(path).items()}
        elif (path / _SINGLE_FILE).exists():
            with safe_open(path / _SINGLE_FILE, framework="pt") as checkpoint:
                file_of = dict.fromkeys(checkpoint.keys(), _SINGLE_FILE)
        else:
            raise ModelError(f"model path {path}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {path}: weights cannot be read: {' '.join(str(error).split())}") from None
    return {_without_prefixes(key): key for key in file_of}, file_of


def _read_weight_map(path: Path) -> dict[str, str]:
    return dict(json.loads((path / _INDEX_FILE).read_text())["weight_map"])


def _without_prefixes(name: str) -> str:
    return name.removeprefix("model.").removeprefix("decoder.")
