"""The page-locked host memory of one step: what goes to the device, and what comes back."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.host_copy import host_copy

Array = npt.NDArray[Any]

_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}
_ALIGNMENT = 16  # bytes; Triton kernels are compiled anew for a pointer of another alignment


class Staging:
    """Kernels read and write these buffers where they are, so they live until the step has been read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []

    def to_device(self, groups: dict[str, dict[str, Array]]) -> dict[str, dict[str, Tensor]]:
        """The arrays as tensors of the same shapes and dtypes; to a GPU in one asynchronous copy."""
        if self._device.type == "cpu" or not groups:
            return {
                group: {name: torch.from_numpy(a) for name, a in arrays.items()} for group, arrays in groups.items()
            }
        flat = [array for arrays in groups.values() for array in arrays.values()]
        offsets = [0, *np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in flat]).tolist()]
        buffer = self._buffer(offsets[-1], torch.uint8)
        host = buffer.numpy()
        for array, offset in zip(flat, offsets, strict=False):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        copied = torch.empty(offsets[-1], dtype=torch.uint8, device=self._device)
        host_copy(buffer, copied)
        tensors = (
            copied[offset : offset + array.nbytes].view(_TORCH_DTYPES[array.dtype.name]).view(array.shape)
            for array, offset in zip(flat, offsets, strict=False)
        )
        return {group: {name: next(tensors) for name in arrays} for group, arrays in groups.items()}

    def upload(self, words: npt.NDArray[np.int32], target: Tensor) -> None:
        """target[:] = words, both int32 [N], asynchronously."""
        buffer = self._buffer(len(words), torch.int32)
        buffer.numpy()[:] = words
        host_copy(buffer, target)

    def to_host(self, source: Tensor) -> Tensor:
        """A copy on the host, complete when what is on the current stream has run."""
        if not source.is_cuda or source.shape[0] == 0:
            return source.cpu()
        buffer = self._buffer(source.shape[0], source.dtype)
        host_copy(source, buffer)
        return buffer

    def _buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        self._buffers.append(torch.empty(length, dtype=dtype, pin_memory=self._device.type == "cuda"))
        return self._buffers[-1]
