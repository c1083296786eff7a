"""How the processes of a replica come to be: a launcher starts its ranks, and tells how they get on.

A replica is a group of ranks, a process each; rank 0 leads and speaks with the stage. They start together, and the end
of any of them is the end of all.
"""

import os
from dataclasses import dataclass
from typing import Protocol

import zmq

from ensemble.config import StageName
from ensemble.replicas.progress import Beats

WORKER = ["-m", "ensemble.replicas.worker"]  # what an interpreter runs as a rank
# glibc's settings for the Triton server, which else keeps 100 MB for reuse after texts of 20 and 60 MB: what is large
# comes from the system and returns to it; and there are a quarter of the heaps, each of which may keep 64 MB. Not for
# ranks on a CPU, whose tensors are as large and come at every step.
GIVE_BACK_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 20),
    "MALLOC_ARENA_MAX": str(2 * len(os.sched_getaffinity(0))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """What the ranks of a replica are started with."""

    home: StageName
    replica: int
    life: int  # the first of these processes
    devices: tuple[str, ...]  # of each rank, in the order of ranks
    stage_address: str

    @property
    def name(self) -> str:
        """Which no other processes of the stage have."""
        return f"{self.replica}-{self.life}"


def rank_arguments(start: ReplicaStart, rank: int, peer_address: str, group_address: str) -> list[str]:
    """Of ensemble.replicas.worker, but for the descriptors at their end.

    peer_address: where other replicas find this rank. group_address: where the ranks meet, as torch's `init_method`.
    """
    arguments = [start.home, str(start.replica), str(start.life), str(rank), ",".join(start.devices)]
    return [*arguments, start.stage_address, peer_address, group_address]


class RankProcesses(Protocol):
    """The processes of a replica, from their start to the end of the first of them."""

    @property
    def exit_fd(self) -> int:
        """Readable when one has ended, or could not be started."""

    @property
    def name(self) -> str:
        """As the operator is told of them: "worker process 4711"."""

    @property
    def waits_for(self) -> str:
        """What they cannot start without: "a node with 1 GPU free"; empty: nothing."""

    @property
    def node(self) -> str:
        """Of several machines, the one where they run; empty: they run on the stage's own."""

    @property
    def progress(self) -> list[Beats]:
        """Of each rank."""

    def kill(self) -> None:
        """Ends all, also those that stand still; `exit_fd` will tell. May be repeated."""

    def collect(self) -> str:
        """To be called once, when `exit_fd` is readable: ends those that still run. Returns how the first ended."""


class Launcher(Protocol):
    """Not thread-safe."""

    def bind(self, socket: "zmq.Socket[bytes]") -> str:
        """Binds the stage's socket where workers can reach it; returns the address."""

    def start(self, start: ReplicaStart) -> RankProcesses: ...

    def close(self, timeout_s: float) -> None:
        """Ends all processes that run; kills those that take longer. May be repeated."""
