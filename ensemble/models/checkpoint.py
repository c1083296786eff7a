"""The weight files of a model directory: which of them count, and what the directory is if none does.

Which file counts is as in transformers: one complete file before an index of several, safetensors before `.bin`.
safetensors files are read straight to the device; PyTorch's `.bin` files are unpickled as tensors and nothing else, so
that a file cannot run code.
"""

import fnmatch
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble.errors import ModelError

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # by preference; several have NAME.index.json
_LFS_POINTER = b"version https://git-lfs"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how a `.bin` file begins: as torch writes it since 1.6, and before

# Patterns of files |-> what a directory with them, and without weights of ours, is.
_OTHER_FORMATS = {
    "*.gguf": "holds a GGUF model, which llama.cpp reads",
    "adapter_config.json": "holds an adapter (LoRA) and not a model: merge it into its base model",
    "tf_model*.h5": "holds TensorFlow weights alone",
    "flax_model*.msgpack": "holds Flax weights alone",
    "consolidated*": "holds weights in their maker's own format: convert them for transformers",
    "*.engine": "holds a TensorRT engine",
    "*.onnx": "holds an ONNX model",
    "model_index.json": "holds a diffusion pipeline",
}
WANTED = "a Hugging Face directory is needed, with config.json and safetensors or .bin files"


def other_format(names: Iterable[str]) -> str | None:
    """What a directory or repository with these files holds instead of weights of ours; None: nothing known."""
    names = sorted(names)
    for pattern, meaning in _OTHER_FORMATS.items():
        if found := fnmatch.filter(names, pattern):
            return f"{meaning} ({found[0]})"
    return None


def what_it_is(path: Path) -> str:
    """Says of a path that is no checkpoint what it is instead, and what is needed."""
    if not path.exists():
        return "no such directory"
    if not path.is_dir():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        return f"is {kind}; {WANTED}"
    names = sorted(file.name for file in path.iterdir())
    if other := other_format(names):
        return f"{other}; {WANTED}"
    if not names:
        return f"is empty; {WANTED}"
    if "config.json" not in names:
        models = sorted(path.glob("*/config.json")) or sorted(path.glob("snapshots/*/config.json"))
        instead = f"; {models[0].parent} has one" if models else ""
        return f"has no config.json{instead}; {WANTED}"
    variants = fnmatch.filter(names, "model.*.safetensors")
    instead = f"; {variants[0]} is a variant, which is not looked for" if variants else ""
    return f"has neither {' nor '.join(_SINGLE_FILES)}, nor an index of several{instead}"


def stored_dtype(path: Path) -> torch.dtype | None:
    """Of the first floating point weight; None where there is none to be read."""
    try:
        checkpoint = Checkpoint(path)
        dtypes = (checkpoint.tensor(key).dtype for key in checkpoint.file_of)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    except ModelError:
        return None


class WeightFile(Protocol):
    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, key: str, part: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, of which only that part is read."""


class _Safetensors:
    def __init__(self, opened: Any) -> None:
        self._opened = opened  # of safe_open, which has no type of its own

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._opened.get_slice(key).get_shape())

    def read(self, key: str, part: tuple[slice, ...]) -> Tensor:
        is_whole = all(each == slice(0, size) for each, size in zip(part, self.shape(key), strict=True))
        tensor: Tensor = self._opened.get_tensor(key) if is_whole else self._opened.get_slice(key)[part]
        return tensor


class _Pickle:
    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self._file, self._tensors = file, tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor(key).shape)

    def read(self, key: str, part: tuple[slice, ...]) -> Tensor:
        return self._tensor(key)[part]

    def _tensor(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise ModelError(f"{self._file}: has no weight {key}, which the index says it has")
        return self._tensors[key]


class Checkpoint:
    """The weights of one model directory, by key. Raises ModelError, in one line, at once or when a file is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_pickle: tuple[Path, dict[str, Tensor]] | None = None
        self.file_of = self._find_files()  # key |-> name of the file that holds it

    @contextmanager
    def open(self, name: str, device: torch.device) -> Iterator[WeightFile]:
        """One of the files that `file_of` names, to read from it to the device (of a `.bin` file: to the host)."""
        file = self.path / name
        if file.suffix == ".bin":
            yield _Pickle(file, self._pickle(file))
            return
        _refuse_pointer(file)
        try:
            with safe_open(file, framework="pt", device=str(device)) as checkpoint:
                yield _Safetensors(checkpoint)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on the host."""
        with self.open(self.file_of[key], torch.device("cpu")) as opened:
            return opened.read(key, tuple(slice(0, size) for size in opened.shape(key)))

    def _find_files(self) -> dict[str, str]:
        counts = _what_counts(self.path)
        if counts.suffix == ".json":
            return _weight_map(counts)
        return dict.fromkeys(self._keys(counts), counts.name)

    def _keys(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._pickle(file))
        _refuse_pointer(file)
        try:
            with safe_open(file, framework="pt") as checkpoint:
                return list(checkpoint.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        """Kept until another is asked for: reading one in the older format takes long."""
        if self._last_pickle is None or self._last_pickle[0] != file:
            self._last_pickle = None
            self._last_pickle = (file, _load_pickled(file))
        return self._last_pickle[1]


def weight_files(path: Path) -> list[Path]:
    """The files of a model directory that are loaded, in order. Raises ModelError."""
    counts = _what_counts(path)
    return sorted({path / name for name in _weight_map(counts).values()}) if counts.suffix == ".json" else [counts]


def _what_counts(path: Path) -> Path:
    """A file with all weights, or the index of several."""
    for name in _SINGLE_FILES:
        for file in (path / name, path / f"{name}.index.json"):
            if file.exists():
                return file
    raise ModelError(f"model path {path}: {what_it_is(path)}")


def _weight_map(index: Path) -> dict[str, str]:
    """key |-> name of the file that holds it"""
    _refuse_pointer(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(file) for key, file in weight_map.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read: {_one_line(error)}") from None


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file: of a zip still on disk, whose pages are read when they are copied; of the older
    format, which torch wrote before 1.6, in memory."""
    start = _refuse_pointer(file)
    is_zip = start.startswith(_ZIP)
    if not is_zip and not start.startswith(_PICKLE):
        raise ModelError(f"{file}: cannot be read: it is neither a zip file nor a pickle of torch's")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:  # torch's own advice is to trust the file
        raise ModelError(f"{file}: refused: it is no pickle of tensors alone, and any other could run code") from None
    except (RuntimeError, OSError, EOFError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, not names and tensors")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _refuse_pointer(file: Path) -> bytes:
    """Raises ModelError for what git leaves of a large file that it has not fetched. Returns how the file begins."""
    try:
        with file.open("rb") as content:
            start = content.read(len(_LFS_POINTER))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {_one_line(error)}") from None
    if start == _LFS_POINTER:
        raise ModelError(f"{file}: is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}")
    return start


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
