"""Memory of the host that a GPU reaches, page-locked: this process's own, or shared with another."""

import mmap
import sys

import torch


def host_memory(
    num_bytes: int,
    device: torch.device,  # that is to reach it; nothing is locked for a CPU
    fd: int = -1,  # of a file of so many bytes, to share it; else it is this process's own
) -> torch.Tensor:  # [num_bytes] uint8
    """Raises OSError, MemoryError or RuntimeError if the host has none."""
    # Not `pin_memory=True`, which takes the next power of two of bytes. Pages of its own, so that nothing else comes to
    # lie in what is registered.
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = _Memory(fd, num_bytes, flags)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        memory.register(tensor)
    return tensor


class _Memory(mmap.mmap):
    """Page-locked, if it is, until just before it is unmapped."""

    address: int | None = None

    def register(self, tensor: torch.Tensor) -> None:
        # portable: for the contexts of all devices
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1))
        self.address = tensor.data_ptr()

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.address)
