"""Two processes that send tensors to each other: NCCL between GPUs, gloo between CPUs. One pair for each link.

A pair that has failed, or was ended, is of no more use. NCCL's kernels spin until the other side comes: they are
launched only when both sides have said that they will be (the reader by its ReadChunks, the source by its ChunksCome),
and ended when they take too long.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from ensemble.cache.block_copier import Copier, Copy, StreamCopier, ThreadCopier
from ensemble.errors import LinkBroken
from ensemble.transfer import nccl


class Pair(Protocol):
    """Sends and receives run in the order in which they are started, and in order with the copies of its copier.

    Calls raise LinkBroken when the other side is gone, or does not come within the pair's time-out.
    """

    def send(self, runs: list[torch.Tensor]) -> Copy:
        """Starts it, in one launch. runs: [num_bytes] uint8"""
        ...

    def receive(self, runs: list[torch.Tensor]) -> Copy:
        """Starts it, in one launch; the other side may divide what it sends into other launches."""
        ...

    def check(self) -> None:
        """Raises LinkBroken if it has failed, as far as has been noticed."""
        ...

    def end(self) -> None:
        """What is under way ends soon, without having come."""
        ...


class Meeting(Protocol):
    """The first side's end, before the second has come."""

    rendezvous: bytes  # by which `join` finds it

    def wait(self) -> Pair: ...


def meet(device: torch.device, copier: Copier, timeout_s: float, is_closing: Callable[[], bool]) -> Meeting:
    """is_closing: asked while NCCL waits, which does not see that the other side has died. Gloo does."""
    if isinstance(copier, StreamCopier):
        return nccl.NcclMeeting(device, copier.stream, timeout_s, is_closing)
    return _GlooMeeting(copier, timeout_s)


def join(
    rendezvous: bytes, device: torch.device, copier: Copier, timeout_s: float, is_closing: Callable[[], bool]
) -> Pair:
    if isinstance(copier, StreamCopier):
        return nccl.NcclPair(rendezvous, 1, device, copier.stream, timeout_s, is_closing)
    try:
        store = TCPStore("127.0.0.1", int(rendezvous), is_master=False, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise LinkBroken(f"gloo: {_one_line(error)}") from None
    return _GlooPair(store, 1, copier, timeout_s)


class _GlooMeeting:
    """Of two processes of one host."""

    def __init__(self, copier: ThreadCopier, timeout_s: float) -> None:
        self._copier, self._timeout_s = copier, timeout_s
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self.rendezvous = str(self._store.port).encode()

    def wait(self) -> "_GlooPair":
        return _GlooPair(self._store, 0, self._copier, self._timeout_s)


class _GlooPair:
    def __init__(self, store: Store, rank: int, copier: ThreadCopier, timeout_s: float) -> None:
        self._peer, self._copier, self._timeout = 1 - rank, copier, timedelta(seconds=timeout_s)
        self._store = store  # the first side's serves it
        try:
            self._group: Any = dist.ProcessGroupGloo(store, rank, 2, self._timeout)
        except RuntimeError as error:
            raise LinkBroken(f"gloo: {_one_line(error)}") from None

    def send(self, runs: list[torch.Tensor]) -> Copy:
        return self._copier.run(self._move, "send", runs)

    def receive(self, runs: list[torch.Tensor]) -> Copy:
        return self._copier.run(self._move, "recv", runs)

    def check(self) -> None:
        pass  # who waits for a copy hears of it

    def end(self) -> None:
        self._group = None

    def _move(self, name: str, runs: list[torch.Tensor]) -> float:  # seconds
        group, began = self._group, time.monotonic()
        deadline = began + self._timeout.total_seconds()
        if group is None:
            raise LinkBroken("gloo: the pair has ended")
        try:
            for run in runs:
                left_s = max(1e-3, deadline - time.monotonic())
                getattr(group, name)([run], self._peer, 0).wait(timedelta(seconds=left_s))
        except RuntimeError as error:
            self.end()
            raise LinkBroken(f"gloo: {_one_line(error)}") from None
        return time.monotonic() - began


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
