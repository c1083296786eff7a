"""The KV pool of one worker: one tensor, one allocation of its own, exported once to peers.

    pool[block_id, layer, 0 = key | 1 = value, kv_head, offset, :]      slot = block_id * block_size + offset

A block holds all layers, so a swap or a hand-off moves few large pieces; a range of layers, and a range of heads
within a layer, are contiguous, which serves stages of unequal tensor and pipeline parallelism.

On a CPU the pool lies in an anonymous memory file (memfd): it has no name that could outlive the process, is not
bounded by /dev/shm, and pages are taken only when first written.
"""

import mmap
import os
import secrets
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ensemble.errors import ConfigError
from ensemble.protocol.replica_replica import PoolHandle, decode_cuda_ipc, encode
from kernels.block_copy import copy_blocks


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and dtype of a block of this rank's layers and heads, and which of the model's they are."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    first_layer: int = 0
    kv_heads: tuple[int, ...] = ()  # the model's, one for each of these; empty: all of them

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.block_shape) * self.dtype.itemsize

    def num_blocks_in(self, num_bytes: int) -> int:
        """Blocks that fit. Raises ConfigError if not even one does."""
        num_blocks = num_bytes // self.block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes = {num_bytes}: the KV pool is too small for one block of {self.block_bytes} bytes"
                f" ({self.block_size} tokens)"
            )
        return num_blocks


class KVPool:
    """This worker's pool. `tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, *layout.block_shape)
        if device.type == "cuda":
            self._fd = None
            self.tensor = torch.zeros(shape, dtype=layout.dtype, device=device)
        else:
            num_bytes = num_blocks * layout.block_bytes
            self._name = f"distserve-kv-pool-{secrets.token_hex(8)}"
            self._fd = os.memfd_create(self._name)
            os.ftruncate(self._fd, num_bytes)
            self.tensor = _map_file(self._fd, num_bytes, layout.dtype).view(shape)

    def copy_blocks(self, source_ids: list[int], target_ids: list[int]) -> None:
        """Within the pool, after the steps launched before: block source_ids[i] |-> block target_ids[i].

        Returns when that is done: both may be given to a copy on another stream, which waits for no step.
        """
        sources, targets = torch.tensor([source_ids, target_ids], device=self.tensor.device)
        copy_blocks(self.tensor, self.tensor, sources, targets)
        if self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()

    def export(self) -> PoolHandle:
        """The handle by which a peer process maps this pool, for as long as this process lives."""
        if self._fd is None:
            return export_cuda(self.tensor)
        shape, dtype = list(self.tensor.shape), str(self.layout.dtype).removeprefix("torch.")
        path = f"/proc/{os.getpid()}/fd/{self._fd} {self._name}"
        return PoolHandle(kind="memfd", handle=path.encode(), shape=shape, dtype=dtype)


def export_cuda(tensor: torch.Tensor) -> PoolHandle:
    """The handle of a tensor on a GPU that is the only one of its storage, for as long as this process lives."""
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    torch.cuda.synchronize(tensor.device)  # what it holds by now is there: peers wait for no event
    shared: tuple[object, ...] = tensor.untyped_storage()._share_cuda_()
    return PoolHandle(kind="cuda_ipc", handle=encode(shared), shape=shape, dtype=dtype, host=_this_host())


def map_peer_pool(handle: PoolHandle, device: torch.device) -> torch.Tensor:
    """Maps another process's pool; dropping the tensor closes the mapping.

    A CUDA IPC handle is opened with `device`, the importer's own, current: a Triton kernel may then read the memory;
    opened under the exporter's index the kernel refuses the pointer. Raises OSError or RuntimeError if it cannot be
    mapped here: another host, another IPC namespace, no peer access, a CPU's pool for a GPU, or the process has just
    died.
    """
    dtype = getattr(torch, handle.dtype)
    if (handle.kind == "cuda_ipc") != (device.type == "cuda"):
        raise RuntimeError(f"pool handle = {handle.kind}: {device} does not map the memory of another kind of device")
    if handle.kind == "cuda_ipc":
        if handle.host != _this_host():
            raise FileNotFoundError(f"the pool is on another host, {handle.host}")
        exporter = decode_cuda_ipc(handle.handle)
        with torch.cuda.device(device):
            # Without the exporter's event: who reads has been told that the steps have run. And torch does not look
            # whether the event could be opened, but waits for what lies on its stack: the process would die of it.
            storage = torch.UntypedStorage._new_shared_cuda(device.index, *exporter[1:-1], False)
            flat = torch.empty(0, dtype=dtype, device=device).set_(storage)
            flat[:1].clone()  # memory that cannot be reached is found out here
            torch.cuda.synchronize(device)
        return flat.view(handle.shape)
    num_bytes = prod(handle.shape) * dtype.itemsize
    path, _, name = handle.handle.decode().partition(" ")
    fd = os.open(path, os.O_RDWR)
    try:
        if name not in os.readlink(f"/proc/self/fd/{fd}") or os.fstat(fd).st_size != num_bytes:
            raise FileNotFoundError(f"{path} is not {name} of {num_bytes} bytes: it is on another host")
        return _map_file(fd, num_bytes, dtype).view(handle.shape)
    finally:
        os.close(fd)


def _this_host() -> str:
    """Until it is started again; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _map_file(fd: int, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED), dtype=dtype)
