"""Starts one stage's worker processes on this machine, notices when one ends, and starts it again."""

import os
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.replicas.progress import Progress

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STABLE_AFTER_S = 10.0  # a worker that has served this long was in no crash loop: the next one's delay is short again
MAX_DETACH_S = 5.0  # who maps a dead worker's pool has this long to let go before it is started again


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """One process of a replica; its lives are numbered on from the ones before."""

    process: subprocess.Popen[bytes]
    exit_fd: int  # readable when the process has ended
    progress: Progress
    identity: bytes  # of its socket: REPLICA:LIFE, of its first life
    life: int  # its present one
    up_at: float | None = None  # time.monotonic() since when it serves
    end_reason: str | None = None  # why it was killed


@dataclass(slots=True, eq=False)
class _Replica:
    device: str
    worker: WorkerProcess | None = None
    has_served: bool = False  # its last process: others may map that one's pool
    backoff_s: float = MIN_BACKOFF_S
    not_before: float = 0.0  # time.monotonic() of the next start, if nothing stands in its way
    restart_at: float | None = None  # of the next start, whatever does; None: none is due


@dataclass(slots=True, eq=False)
class Supervisor:
    """Not thread-safe: the stage's loop owns it and polls `exit_fd` of each worker."""

    home: str  # the stage
    stage_address: str
    run_dir: Path
    _replicas: dict[int, _Replica] = field(init=False, default_factory=dict)
    _num_lives: Counter[int] = field(init=False, default_factory=Counter)  # lives so far, never forgotten
    _alive_pipe: tuple[int, int] = field(init=False, default_factory=os.pipe)  # its end: the stage is gone

    def __contains__(self, replica: object) -> bool:
        return replica in self._replicas

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    @property
    def workers(self) -> dict[int, WorkerProcess]:
        """Those that run, by replica."""
        return {index: each.worker for index, each in self._replicas.items() if each.worker is not None}

    def add(self, replica: int, device: str) -> None:
        self._replicas[replica] = _Replica(device)
        self._start(replica)

    def remove(self, replica: int) -> int:
        """Forgets a replica that does not run. Returns its last life."""
        assert self._replicas.pop(replica).worker is None
        return self._num_lives[replica] - 1

    def new_life(self, replica: int) -> int:
        """The next life begins: in the process that runs, if one does."""
        life = self._num_lives[replica]
        self._num_lives[replica] += 1
        worker = self._replicas[replica].worker
        if worker is not None:
            worker.life = life
        return life

    def kill(self, replica: int, reason: str) -> None:
        """Ends the replica's process, also one that stands still; `reap` will tell, with the reason that came first."""
        worker = self._replicas[replica].worker
        if worker is not None:
            worker.end_reason = worker.end_reason or reason
            worker.process.kill()

    def reap(self, replica: int) -> tuple[int, str]:
        """Collects the process whose exit_fd became readable: (its last life, how it ended)."""
        record = self._replicas[replica]
        worker = record.worker
        assert worker is not None
        code = worker.process.wait()
        record.worker, record.has_served = None, worker.up_at is not None
        _clean_up_after(worker)
        if worker.up_at is not None and time.monotonic() - worker.up_at > STABLE_AFTER_S:
            record.backoff_s = MIN_BACKOFF_S
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return worker.life, worker.end_reason or f"worker process {worker.process.pid} ended ({how})"

    def restart_later(self, replica: int) -> float:
        """Schedules the next life and returns the delay in seconds; it doubles while lives are short.

        After a process that has served, the start waits for `allow`, for MAX_DETACH_S beyond the delay at most.
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
        """Ends all workers: by closing the pipe that they watch, then by SIGKILL."""
        for fd in self._alive_pipe:
            os.close(fd)
        deadline = time.monotonic() + timeout_s
        for worker in self.workers.values():
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            _clean_up_after(worker)

    def _start(self, replica: int) -> None:
        record = self._replicas[replica]
        record.restart_at = None
        life = self.new_life(replica)
        peer_address = f"ipc://{self.run_dir}/{replica}-{life}.peer"
        progress = Progress()
        # The interpreter is the one whose packages the Triton server's stub uses: the first python3 on PATH.
        command = [shutil.which("python3") or "python3", "-m", "ensemble.replicas.worker", self.home]
        command += [str(replica), str(life), record.device, self.stage_address, peer_address]
        fds = [self._alive_pipe[0], progress.fd]
        process = subprocess.Popen([*command, *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL)
        os.close(progress.fd)  # its memory stays
        identity = f"{replica}:{life}".encode()
        record.worker = WorkerProcess(process, os.pidfd_open(process.pid), progress, identity, life)


def _clean_up_after(worker: WorkerProcess) -> None:
    """Removes what torch and CUDA leave in /dev/shm of a process that exported memory and was killed."""
    os.close(worker.exit_fd)
    pid = worker.process.pid
    for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
        for region in Path("/dev/shm").glob(pattern):
            region.unlink(missing_ok=True)
