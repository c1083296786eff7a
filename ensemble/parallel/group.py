"""The ranks of a replica: at each place of its pipeline those among which the layers of the place are divided.

rank = place * tensor_parallel_size + rank in its place
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ensemble.errors import ConfigError, InternalError
from ensemble.parallel.pipeline import WHOLE, Pipeline, PointToPoint
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel, connect, make_process_group

LOOPBACK = "127.0.0.1"
MEET_TIMEOUT_S = 600.0  # a rank that stands still is noticed by its beats; this ends those that nobody watches


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's view of its replica's ranks."""

    tensor: TensorParallel = SINGLE
    pipeline: Pipeline = WHOLE
    store: Store | None = field(default=None, repr=False)  # None: this rank is alone

    @property
    def size(self) -> int:
        return self.tensor.size * self.pipeline.size

    @property
    def rank(self) -> int:
        return self.pipeline.place * self.tensor.size + self.tensor.rank

    def smallest(self, value: int) -> int:
        """Of all ranks' values; waits for the device."""
        return self.pipeline.smallest(self.tensor.smallest(value), self.tensor.device_type)

    def publish(self, name: str, value: str) -> None:
        """For the other ranks to `look_up`."""
        assert self.store is not None
        self.store.set(name, value)

    def look_up(self, name: str) -> str:
        """Waits until a rank has published it. Raises InternalError where none does, in the store's time."""
        assert self.store is not None
        try:
            return self.store.get(name).decode()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InternalError(f"rank {self.rank} of {self.size}: {name} is not to be found: {reason}") from None

    def all_of(self, name: str, value: str) -> list[str]:
        """Every rank's value of that name, this one's among them, by rank."""
        if self.store is None:
            return [value]
        self.publish(f"{name}-{self.rank}", value)
        return [self.look_up(f"{name}-{rank}") for rank in range(self.size)]


ALONE = Group()


def meet(
    address: str,  # of torch's, file:///PATH or tcp://HOST:PORT; the first rank makes what is there
    rank: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    device: torch.device,  # which is current by then
    timeout_s: float = MEET_TIMEOUT_S,
    host: str = LOOPBACK,  # of this rank, as the others reach it: there gloo listens
) -> Group:
    """Waits for all ranks to come. Raises InternalError for one that does not, in `timeout_s`."""
    size = tensor_parallel_size * pipeline_parallel_size
    if size == 1:
        return ALONE
    store = make_store(address, rank, size, timeout_s)
    return join(store, rank, tensor_parallel_size, pipeline_parallel_size, device, timeout_s, host)


def join(
    store: Store,
    rank: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    device: torch.device,
    timeout_s: float = MEET_TIMEOUT_S,
    host: str = LOOPBACK,
) -> Group:
    """The same, with a store that all ranks see."""
    place, tensor_rank = divmod(rank, tensor_parallel_size)
    tensor = connect(PrefixStore(f"place-{place}", store), tensor_rank, tensor_parallel_size, device, timeout_s, host)
    pipeline = WHOLE
    if pipeline_parallel_size > 1:
        among = PrefixStore(f"column-{tensor_rank}", store)
        name = f"pipeline place {place} of {pipeline_parallel_size}"
        channel = make_process_group(among, place, pipeline_parallel_size, device, timeout_s, name, host)
        pipeline = Pipeline(place, pipeline_parallel_size, cast(PointToPoint, channel))
    return Group(tensor, pipeline, store)


def make_store(address: str, rank: int, size: int, timeout_s: float) -> Store:
    """Where the ranks find each other. Raises ConfigError for an address of another kind."""
    parts, timeout = urlsplit(address), timedelta(seconds=timeout_s)
    try:
        if parts.scheme == "file":
            store: Store = dist.FileStore(parts.path, size)  # type: ignore[attr-defined]
            store.set_timeout(timeout)  # else 300 s, which NCCL's communicators would wait for a slow rank
            return store
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            make: Any = dist.TCPStore  # type: ignore[attr-defined]
            store = make(parts.hostname, parts.port, None, rank == 0, timeout, wait_for_workers=False)
            return store
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InternalError(f"rank {rank} of {size}: nothing to meet at, {address}: {reason}") from None
    raise ConfigError(f"group address = {address}: file:///PATH or tcp://HOST:PORT is needed")
