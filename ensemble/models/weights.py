"""Weights into a model: from a checkpoint, each tensor read once and through a mapping of its file, or random.

safetensors files are read straight to the device. PyTorch's `.bin` files are unpickled as tensors and nothing else, so
that a file cannot run code. Checkpoints of OPT exist with and without the prefixes `model.` and `decoder.`; names are
compared without them.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble.errors import ModelError

_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")  # by preference; with `.index.json`, one of several files


def load_weights(
    path: Path,  # a model directory
    named_weights: Iterable[tuple[str, Tensor]],  # checkpoint name |-> tensor to fill
    device: torch.device,
) -> None:
    """Fills every tensor. Raises ModelError naming the weight that is missing or has another shape."""
    file_of = _find_weights(path)
    key_of = {_without_prefixes(key): key for key in file_of}
    wanted: dict[str, dict[str, Tensor]] = {}  # file |-> key in it |-> tensor to fill
    for name, tensor in named_weights:
        key = key_of.get(_without_prefixes(name))
        if key is None:
            raise ModelError(f"model {path}: weight {name} is missing")
        wanted.setdefault(file_of[key], {})[key] = tensor
    for file, tensors in wanted.items():
        for key, weight in _read(path / file, tensors.keys(), device):
            if weight.shape != tensors[key].shape:
                raise ModelError(
                    f"model {path}: weight {key} in {file} has shape {tuple(weight.shape)},"
                    f" config.json asks for {tuple(tensors[key].shape)}"
                )
            tensors[key].copy_(weight)


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


def _find_weights(path: Path) -> dict[str, str]:
    """Returns key |-> file."""
    for name in _CHECKPOINTS:
        index = path / f"{name}.index.json"
        if index.exists():
            try:
                return {
                    str(key): str(file)
                    for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
                }
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise ModelError(f"{index}: cannot be read: {_one_line(error)}") from None
        if (path / name).exists():
            return dict.fromkeys(_keys(path / name), name)
    raise ModelError(f"model path {path}: has neither {' nor '.join(_CHECKPOINTS)}, nor an index of several")


def _keys(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_load_pickled(file))
    try:
        with safe_open(file, framework="pt") as checkpoint:
            return list(checkpoint.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None


def _read(file: Path, keys: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".bin":
        tensors = _load_pickled(file)
        for key in keys:
            if key not in tensors:
                raise ModelError(f"{file}: has no weight {key}, which the index says it has")
            yield key, tensors[key]
        return
    try:
        with safe_open(file, framework="pt", device=str(device)) as checkpoint:
            for key in keys:
                yield key, checkpoint.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, still on disk: their pages are read when they are copied."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's own advice is to trust the file
        raise ModelError(f"{file}: refused: it is no pickle of tensors alone, and any other could run code") from None
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, not names and tensors")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_prefixes(name: str) -> str:
    return name.removeprefix("model.").removeprefix("decoder.")
