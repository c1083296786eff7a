"""Where packed chunks lie on their way: a few slots of as many bytes each."""

import fcntl
import os
import secrets

import torch

from ensemble.cache.host_memory import host_memory

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # who writes into it must not find it shorter
_PROBE_BYTES = 64 << 10  # at most
MAX_BYTES = 1 << 30  # of all slots of a link: more is no request of ours


class Slots:
    """`memory  # [num_slots, slot_bytes] uint8`, on the device or the host."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    @property
    def num_bytes(self) -> int:
        """Of a slot."""
        return self.memory.shape[1]

    def bytes_of(self, slot: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8"""
        return self.memory[slot, :num_bytes]

    def probe_in(self, slot: int) -> torch.Tensor:
        """[num_bytes] uint8: as much as a probe fills."""
        return self.memory[slot, :_PROBE_BYTES]

    def blocks_in(self, slot: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A packed chunk: [num_blocks, num_layers, 2, num_heads, block_size, head_dim]."""
        return self.bytes_of(slot, shape.numel() * dtype.itemsize).view(dtype).view(shape)


def own_slots(num_slots: int, slot_bytes: int, device: torch.device, *, on_device: bool) -> Slots:
    """Of this process alone; on the host page-locked for the device. Raises RuntimeError or OSError without memory."""
    if on_device:
        return Slots(torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device))
    return Slots(host_memory(num_slots * slot_bytes, device).view(num_slots, slot_bytes))


def shared_slots(num_slots: int, slot_bytes: int, device: torch.device) -> tuple[Slots, str, int]:
    """Slots in a memory file, where another process finds it while the descriptor is open, and the descriptor."""
    name = f"distserve-kv-slots-{secrets.token_hex(8)}"
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_slots * slot_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        memory = host_memory(num_slots * slot_bytes, device, fd).view(num_slots, slot_bytes)
    except BaseException:
        os.close(fd)
        raise
    return Slots(memory), f"/proc/{os.getpid()}/fd/{fd} {name}", fd


def map_slots(where: str, num_slots: int, slot_bytes: int, device: torch.device) -> Slots:
    """The other process's slots. Raises OSError if it is none of this host's, or could become shorter."""
    path, _, name = where.partition(" ")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        is_it = name.startswith("distserve-kv-slots-") and name in os.readlink(f"/proc/self/fd/{fd}")
        if not is_it or os.fstat(fd).st_size != num_slots * slot_bytes:
            raise FileNotFoundError(f"{path} is not {name} of {num_slots * slot_bytes} bytes: it is on another host")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise PermissionError(f"{path}: a sealed memory file is wanted")
        return Slots(host_memory(num_slots * slot_bytes, device, fd).view(num_slots, slot_bytes))
    finally:
        os.close(fd)
