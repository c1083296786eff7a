"""The group of ranks among which the layers of one model are divided, in Megatron's way (Shoeybi et al., 2019).

A rank is an object here, not a global of its process: several may live in one process, each on a thread of its own.
Collectives are gloo's on CPUs and NCCL's on GPUs, where they run on the current stream and may be captured in a graph.
Few rows are added up by a kernel of ours, where the GPUs can.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn import functional as F

from ensemble.errors import ConfigError, InternalError
from ensemble.parallel.one_shot import OneShot, map_buffers


class Collectives(Protocol):
    """What is used of torch's gloo and NCCL, as objects that are no process's default group."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work: ...

    def _allgather_base(self, output: Tensor, x: Tensor) -> dist.Work: ...


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank's view of its group. Every rank of it makes the same calls in the same order, with like tensors.

    A peer that is gone, or late by more than the time-out of `connect`, is an InternalError; on GPUs, where a kernel
    alone waits for it, the end of the process.
    """

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None  # None: this rank is alone
    device_type: str = "cpu"
    one_shot: OneShot | None = None  # None: all is gloo's or NCCL's

    def all_reduce(self, x: Tensor) -> Tensor:
        """Adds up the ranks' tensors, in place, to the same bits on every rank. Returns `x`."""
        if self.one_shot is not None and self.one_shot.takes(x):
            self.one_shot.all_reduce(x)
        else:
            self._reduce(x, dist.ReduceOp.SUM)
        return x

    def smallest(self, value: int) -> int:
        """Of the ranks' values; waits for the device."""
        values = torch.tensor([value], device=self.device_type)
        self._reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def of_first(self, values: list[float]) -> list[float]:
        """The first rank's values, of which every rank has as many; waits for the device."""
        shared = torch.tensor(values if self.rank == 0 else [0.0] * len(values), dtype=torch.float64)
        shared = shared.to(self.device_type)
        self._reduce(shared, dist.ReduceOp.SUM)
        first: list[float] = shared.tolist()
        return first

    def all_gather(
        self,
        x: Tensor,  # [S, widths[rank]]
        widths: Sequence[int],
    ) -> Tensor:  # [S, sum(widths)]
        """The ranks' columns side by side."""
        if self.collectives is None:
            return x
        widest = max(widths)
        padded = x.contiguous() if x.shape[1] == widest else F.pad(x, (0, widest - x.shape[1]))
        gathered = x.new_empty(self.size * x.shape[0], widest)
        self._wait(self.collectives._allgather_base(gathered, padded))
        parts = gathered.view(self.size, -1, widest)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _reduce(self, x: Tensor, operation: Any) -> None:
        if self.collectives is not None:
            options = dist.AllreduceOptions()
            options.reduceOp = operation
            self._wait(self.collectives.allreduce([x], options))

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InternalError(f"tensor parallel rank {self.rank} of {self.size}: a peer is gone: {reason}") from None


SINGLE = TensorParallel()


def connect(
    store: Store,  # the group's alone, seen by every rank
    rank: int,
    size: int,
    device: torch.device,  # which NCCL's is current by then
    timeout_s: float = 60.0,
    host: str | None = None,  # where gloo listens; None: at this machine's name
) -> TensorParallel:
    """Waits for all `size` ranks to come. Raises InternalError for one that does not, in `timeout_s`."""
    if not 0 <= rank < size:
        raise ConfigError(f"rank = {rank}: below the size of its group, {size}, is allowed")
    if size == 1:
        return TensorParallel(device_type=device.type)
    name = f"tensor parallel rank {rank} of {size}"
    collectives = cast(Collectives, make_process_group(store, rank, size, device, timeout_s, name, host))
    if device.type == "cpu":
        return TensorParallel(rank, size, collectives, device.type)
    try:
        one_shot = map_buffers(PrefixStore("one-shot", store), rank, size, device, timeout_s)
    except RuntimeError as error:
        raise _cannot_meet(name, error) from None
    return TensorParallel(rank, size, collectives, device.type, one_shot)


def make_process_group(
    store: Store, rank: int, size: int, device: torch.device, timeout_s: float, name: str, host: str | None = None
) -> object:
    """gloo or NCCL among `size` processes or threads, once all have come. Raises InternalError, by the rank's name."""
    timeout = timedelta(seconds=timeout_s)
    try:
        if device.type == "cpu":
            gloo: Any = dist.ProcessGroupGloo
            by_gloo = gloo._Options()
            by_gloo._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
            by_gloo._timeout = timeout
            return gloo(store, rank, size, by_gloo)
        keep_nccl_off_multicast()
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    except RuntimeError as error:
        raise _cannot_meet(name, error) from None


def _cannot_meet(name: str, error: RuntimeError) -> InternalError:
    return InternalError(f"{name}: cannot meet its peers: {' '.join(str(error).split())}")


def keep_nccl_off_multicast() -> None:
    """Before NCCL's first use in a process: NVLink multicast (NVLS) is not to be used on hosts that others use too."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
