"""Starts the processes of one stage's replicas, notices when one ends, and starts it again."""

import time
from collections import Counter
from dataclasses import dataclass, field

from ensemble.config import StageName
from ensemble.replicas.launchers.base import Launcher, RankProcesses, ReplicaStart

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STABLE_AFTER_S = 10.0  # a worker that has served this long was in no crash loop: the next one's delay is short again
MAX_DETACH_S = 5.0  # who maps a dead worker's pool has this long to let go before it is started again


@dataclass(slots=True, eq=False)
class Worker:
    """The processes of a replica that runs; its lives are numbered on from the ones before."""

    processes: RankProcesses
    identity: bytes  # of the first rank's socket: REPLICA:LIFE, of its first life
    life: int  # its present one
    up_at: float | None = None  # time.monotonic() since when it serves
    end_reason: str | None = None  # why it was killed

    @property
    def identities(self) -> list[bytes]:
        """Of all ranks' sockets: those after the first say only why they cannot start."""
        return [self.identity, *(b"%b:%d" % (self.identity, rank) for rank in range(1, len(self.processes.progress)))]

    @property
    def name(self) -> str:
        """As the operator is told of it."""
        return self.processes.name


@dataclass(slots=True, eq=False)
class _Replica:
    devices: tuple[str, ...]  # of its ranks
    worker: Worker | None = None
    has_served: bool = False  # its last processes: others may map that one's pool
    backoff_s: float = MIN_BACKOFF_S
    not_before: float = 0.0  # time.monotonic() of the next start, if nothing stands in its way
    restart_at: float | None = None  # of the next start, whatever does; None: none is due


@dataclass(slots=True, eq=False)
class Supervisor:
    """Not thread-safe: the stage's loop owns it and polls `exit_fd` of each worker's processes."""

    home: StageName
    stage_address: str
    launcher: Launcher
    _replicas: dict[int, _Replica] = field(init=False, default_factory=dict)
    _num_lives: Counter[int] = field(init=False, default_factory=Counter)  # lives so far, never forgotten

    def __contains__(self, replica: object) -> bool:
        return replica in self._replicas

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    @property
    def workers(self) -> dict[int, Worker]:
        """Those that run, by replica."""
        return {index: each.worker for index, each in self._replicas.items() if each.worker is not None}

    def add(self, replica: int, devices: tuple[str, ...]) -> None:
        self._replicas[replica] = _Replica(devices)
        self._start(replica)

    def remove(self, replica: int) -> int:
        """Forgets a replica that does not run. Returns its last life."""
        assert self._replicas.pop(replica).worker is None
        return self._num_lives[replica] - 1

    def new_life(self, replica: int) -> int:
        """The next life begins: in the processes that run, if any do."""
        life = self._num_lives[replica]
        self._num_lives[replica] += 1
        worker = self._replicas[replica].worker
        if worker is not None:
            worker.life = life
        return life

    def kill(self, replica: int, reason: str) -> None:
        """Ends a replica, also one that stands still; `reap` will tell, with the reason that came first."""
        worker = self._replicas[replica].worker
        if worker is not None:
            worker.end_reason = worker.end_reason or reason
            worker.processes.kill()

    def reap(self, replica: int) -> tuple[int, str]:
        """Collects the processes whose exit_fd became readable: (their last life, how they ended)."""
        record = self._replicas[replica]
        worker = record.worker
        assert worker is not None
        how = worker.processes.collect()
        record.worker, record.has_served = None, worker.up_at is not None
        if worker.up_at is not None and time.monotonic() - worker.up_at > STABLE_AFTER_S:
            record.backoff_s = MIN_BACKOFF_S
        return worker.life, worker.end_reason or how

    def restart_later(self, replica: int) -> float:
        """Schedules the next life and returns the delay in seconds; it doubles while lives are short.

        After processes that have served, the start waits for `allow`, for MAX_DETACH_S beyond the delay at most.
        """
        record = self._replicas[replica]
        delay = record.backoff_s
        record.backoff_s = min(2 * delay, MAX_BACKOFF_S)
        record.not_before = time.monotonic() + delay
        record.restart_at = record.not_before + (MAX_DETACH_S if record.has_served else 0.0)
        return delay

    def allow(self, replica: int) -> None:
        """Nothing stands in the way of the replica's next life but its delay."""
        record = self._replicas.get(replica)
        if record is not None and record.restart_at is not None:
            record.restart_at = record.not_before

    @property
    def restart_times(self) -> list[float]:
        """When (time.monotonic()) the next lives begin."""
        return [each.restart_at for each in self._replicas.values() if each.restart_at is not None]

    def start_due(self) -> None:
        """Starts the workers whose delay has passed."""
        now = time.monotonic()
        for replica, record in self._replicas.items():
            if record.restart_at is not None and record.restart_at <= now:
                self._start(replica)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ends all workers; kills those that take longer."""
        self.launcher.close(timeout_s)

    def _start(self, replica: int) -> None:
        record = self._replicas[replica]
        record.restart_at = None
        life = self.new_life(replica)
        start = ReplicaStart(
            home=self.home, replica=replica, life=life, devices=record.devices, stage_address=self.stage_address
        )
        record.worker = Worker(self.launcher.start(start), f"{replica}:{life}".encode(), life)
