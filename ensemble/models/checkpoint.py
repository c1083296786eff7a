"""The weights of a model directory.

safetensors files are read straight to the device; PyTorch's `.bin` files are unpickled as tensors and nothing else, so
that a file cannot run code.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble.errors import ModelError
from ensemble.models.model_files import one_line, refuse_pointer, weight_map, what_counts

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how a `.bin` file begins: as torch writes it since 1.6, and before


def stored_dtype(path: Path) -> str | None:
    """Of the first floating point weight, by torch's name; None where there is none to be read."""
    try:
        checkpoint = Checkpoint(path)
        dtypes = (checkpoint.tensor(key).dtype for key in checkpoint.file_of)
        return next((str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point), None)
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
        refuse_pointer(file)
        try:
            with safe_open(file, framework="pt", device=str(device)) as checkpoint:
                yield _Safetensors(checkpoint)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read: {one_line(error)}") from None

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on the host."""
        with self.open(self.file_of[key], torch.device("cpu")) as opened:
            return opened.read(key, tuple(slice(0, size) for size in opened.shape(key)))

    def _find_files(self) -> dict[str, str]:
        counts = what_counts(self.path)
        if counts.suffix == ".json":
            return weight_map(counts)
        return dict.fromkeys(self._keys(counts), counts.name)

    def _keys(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._pickle(file))
        refuse_pointer(file)
        try:
            with safe_open(file, framework="pt") as checkpoint:
                return list(checkpoint.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read: {one_line(error)}") from None

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        """Kept until another is asked for: reading one in the older format takes long."""
        if self._last_pickle is None or self._last_pickle[0] != file:
            self._last_pickle = None
            self._last_pickle = (file, _load_pickled(file))
        return self._last_pickle[1]


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file: of a zip still on disk, whose pages are read when they are copied; of the older
    format, which torch wrote before 1.6, in memory."""
    start = refuse_pointer(file)
    is_zip = start.startswith(_ZIP)
    if not is_zip and not start.startswith(_PICKLE):
        raise ModelError(f"{file}: cannot be read: it is neither a zip file nor a pickle of torch's")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:  # torch's own advice is to trust the file
        raise ModelError(f"{file}: refused: it is no pickle of tensors alone, and any other could run code") from None
    except (RuntimeError, OSError, EOFError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, not names and tensors")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}
