"""The all-reduce of a few rows by a kernel of ours instead of NCCL's, where the ranks' GPUs map each other's memory.

Each rank has a buffer, which the others map by CUDA IPC. They find out together, when they meet, whether all can.
"""

import ctypes
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from ensemble.cache.kv_pool import export_cuda, map_peer_pool
from ensemble.operator_log import tell_operator
from ensemble.protocol.replica_replica import PoolHandle
from kernels.all_reduce import BUFFER_BYTES, MAX_BYTES, all_reduce
from kernels.backend import TRITON_DTYPES

MAX_RANKS = 8
# Of all ranks together, as each reads them all: n / 2 times what NCCL's ring moves. 2 MiB of two ranks, 512 KiB of 8.
_MOST_BYTES = 4 << 20
_POLLS_PER_S = 1_000_000
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED


class _Offer(msgspec.Struct, frozen=True, kw_only=True):
    device: str  # the GPU's UUID
    buffer: PoolHandle | None  # None: it cannot be shared
    why_not: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class OneShot:
    """A rank's view of all ranks' buffers. All ranks make the same calls in the same order, on one stream each."""

    buffers: list[Tensor]  # [BUFFER_BYTES] uint8, by rank; those of the others are mapped as long as they are kept
    addresses: Tensor  # [size] int64, on the device
    rank: int
    max_polls: int

    def takes(self, x: Tensor) -> bool:
        """Whether a tensor is small enough, and of a kind, to be added up here. The same on every rank."""
        num_bytes = x.numel() * x.element_size()
        is_small = 0 < num_bytes <= min(_MOST_BYTES // len(self.buffers), MAX_BYTES)
        return is_small and x.dtype in TRITON_DTYPES and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> None:
        """In place; summed in float32, in the order of ranks, on each of them.

        A rank that comes later than the group's time-out, or never, ends the others' processes, as NCCL's watchdog
        does: their GPUs fail by an assertion.
        """
        all_reduce(x, self.addresses, self.buffers[self.rank].data_ptr(), self.max_polls)


def map_buffers(
    store: Store,  # for this alone, seen by every rank
    rank: int,
    size: int,
    device: torch.device,  # a GPU, which is current
    timeout_s: float,  # of the group
) -> OneShot | None:
    """None, on every rank, where one of them cannot map another's; rank 0 says which. Waits for all ranks.

    Raises RuntimeError for one that does not come in the store's time.
    """
    if size > MAX_RANKS:
        return None
    own = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=device)
    store.set(f"offer-{rank}", msgspec.json.encode(_offer(own)).decode())
    buffers, reason = [], ""
    for peer in range(size):
        offer = msgspec.json.decode(store.get(f"offer-{peer}"), type=_Offer)
        try:
            buffers.append(own if peer == rank else _map(offer, device))
        except (OSError, RuntimeError) as error:
            reason = f"rank {rank} does not map the memory of rank {peer}: {' '.join(str(error).split())}"
    store.set(f"reason-{rank}", reason)
    reasons = [store.get(f"reason-{peer}").decode() for peer in range(size)]
    if any(reasons):
        if rank == 0:
            tell_operator(f"every all-reduce is NCCL's: {'; '.join(filter(None, reasons))}")
        return None
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64, device=device)
    return OneShot(buffers, addresses, rank, int(timeout_s * _POLLS_PER_S))


def _offer(buffer: Tensor) -> _Offer:
    device = _uuid(buffer.device.index)
    try:
        return _Offer(device=device, buffer=export_cuda(buffer))
    except RuntimeError as error:
        return _Offer(device=device, buffer=None, why_not=str(error))


def _map(offer: _Offer, device: torch.device) -> Tensor:
    """Raises OSError or RuntimeError where that is not possible."""
    if offer.buffer is None:
        raise RuntimeError(f"it cannot be shared: {offer.why_not}")
    peers = [index for index in range(torch.cuda.device_count()) if _uuid(index) == offer.device]
    if not peers or not _counts_on(device.index, peers[0]):
        raise RuntimeError(f"there is no NVLink to GPU {offer.device}")
    return map_peer_pool(offer.buffer, device)


def _counts_on(device: int, peer: int) -> bool:
    """Whether a GPU can add to a number in the memory of another: over NVLink it can, over PCIe it cannot."""
    value = ctypes.c_int()
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMICS, device, peer)
    return not failed and bool(value.value)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
