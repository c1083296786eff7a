"""Two processes that send tensors to each other: NCCL between GPUs, gloo between CPUs. One pair for each link.

A pair that has failed, or was ended, is of no more use. NCCL's kernels spin until the other side comes: they are
launched only when both sides have said that they will be, and ended when they take too long.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from ensemble.errors import LinkBroken
from ensemble.transfer import nccl


class Pair(Protocol):
    """Every call blocks its thread, for the pair's time-out at most, and raises LinkBroken when the other is gone."""

    def send(self, tensors: list[torch.Tensor]) -> None:
        """As one group; returns when they have been sent."""
        ...

    def receive(self, tensors: list[torch.Tensor]) -> None:
        """As one group; returns when they are there."""
        ...

    def end(self) -> None: ...


class Meeting(Protocol):
    """The first side's end, before the second has come."""

    rendezvous: bytes  # by which `join` finds it

    def wait(self) -> Pair: ...


def meet(device: torch.device, timeout_s: float) -> Meeting:
    return _GlooMeeting(timeout_s) if device.type == "cpu" else nccl.NcclMeeting(device, timeout_s)


def join(
    rendezvous: bytes, device: torch.device, timeout_s: float, is_closing: Callable[[], bool] = lambda: False
) -> Pair:
    """is_closing: asked while NCCL waits, which does not see that the other side has died. Gloo does."""
    if device.type == "cuda":
        return nccl.NcclPair(rendezvous, 1, device, timeout_s, is_closing)
    try:
        store = TCPStore("127.0.0.1", int(rendezvous), is_master=False, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise LinkBroken(f"gloo: {_one_line(error)}") from None
    return _GlooPair(store, 1, timeout_s)


class _GlooMeeting:
    """Of two processes of one host."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self.rendezvous = str(self._store.port).encode()

    def wait(self) -> "_GlooPair":
        return _GlooPair(self._store, 0, self._timeout_s)


class _GlooPair:
    def __init__(self, store: Store, rank: int, timeout_s: float) -> None:
        self._peer, self._timeout = 1 - rank, timedelta(seconds=timeout_s)
        self._store = store  # the first side's serves it
        try:
            self._group: Any = dist.ProcessGroupGloo(store, rank, 2, self._timeout)
        except RuntimeError as error:
            raise LinkBroken(f"gloo: {_one_line(error)}") from None

    def send(self, tensors: list[torch.Tensor]) -> None:
        group = self._alive()
        self._wait([group.send([tensor], self._peer, 0) for tensor in tensors])

    def receive(self, tensors: list[torch.Tensor]) -> None:
        group = self._alive()
        self._wait([group.recv([tensor], self._peer, 0) for tensor in tensors])

    def end(self) -> None:
        self._group = None

    def _alive(self) -> Any:
        if self._group is None:
            raise LinkBroken("gloo: the pair has ended")
        return self._group

    def _wait(self, works: list[dist.Work]) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()
        try:
            for work in works:
                work.wait(timedelta(seconds=max(1e-3, deadline - time.monotonic())))
        except RuntimeError as error:
            self.end()
            raise LinkBroken(f"gloo: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
