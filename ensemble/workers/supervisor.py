"""Starts one stage's worker processes on this machine, notices when one ends, and starts it again."""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STABLE_AFTER_S = 10.0  # a worker that has served this long was in no crash loop: the next one's delay is short again


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """One life (epoch) of a replica's worker."""

    process: subprocess.Popen[bytes]
    exit_fd: int  # readable when the process has ended
    epoch: int
    up_at: float | None = None  # time.monotonic() since when it serves


class Supervisor:
    """Not thread-safe: the stage's loop owns it and polls `exit_fd` of each worker."""

    def __init__(self, stage: str, num_replicas: int, stage_address: str, run_dir: Path) -> None:
        self._stage = stage
        self._stage_address = stage_address
        self._run_dir = run_dir
        self._alive_read, self._alive_write = os.pipe()
        self.workers: list[WorkerProcess | None] = [None] * num_replicas
        self._next_epoch = [0] * num_replicas
        self._backoff_s = [MIN_BACKOFF_S] * num_replicas
        self._restart_at: dict[int, float] = {}
        self._not_before: dict[int, float] = {}
        for replica in range(num_replicas):
            self._start(replica)

    def _start(self, replica: int) -> None:
        epoch = self._next_epoch[replica]
        self._next_epoch[replica] += 1
        peer_address = f"ipc://{self._run_dir}/{self._stage}-{replica}-{epoch}.peer"
        # The interpreter is the one whose packages the Triton server's stub uses: the first python3 on PATH.
        python = shutil.which("python3") or "python3"
        arguments = [self._stage, str(replica), str(epoch), self._stage_address, peer_address, str(self._alive_read)]
        process = subprocess.Popen(
            [python, "-m", "ensemble.workers.worker", *arguments],
            pass_fds=[self._alive_read],
            stdin=subprocess.DEVNULL,
        )
        self.workers[replica] = WorkerProcess(process, os.pidfd_open(process.pid), epoch)

    def kill(self, replica: int, epoch: int) -> None:
        """Ends this life of a worker, if it is not over; `reap` will tell."""
        worker = self.workers[replica]
        if worker is not None and worker.epoch == epoch:
            worker.process.kill()

    def reap(self, exit_fd: int) -> tuple[int, int, str]:
        """Collects the worker whose exit_fd became readable: (replica, epoch, how it ended)."""
        for replica, worker in enumerate(self.workers):
            if worker is not None and worker.exit_fd == exit_fd:
                code = worker.process.wait()
                os.close(exit_fd)
                remove_shared_memory(worker.process.pid)
                self.workers[replica] = None
                if worker.up_at is not None and time.monotonic() - worker.up_at > STABLE_AFTER_S:
                    self._backoff_s[replica] = MIN_BACKOFF_S
                how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
                return replica, worker.epoch, f"worker process {worker.process.pid} ended ({how})"
        raise KeyError(exit_fd)

    @property
    def restart_times(self) -> list[float]:
        """When (time.monotonic()) the next lives begin."""
        return list(self._restart_at.values())

    def restart_later(self, replica: int, max_extra_s: float = 0.0) -> float:
        """Schedules the next life and returns the delay in seconds; it doubles while lives are short.

        The start waits for `allow`, for `max_extra_s` beyond the delay at most.
        """
        delay = self._backoff_s[replica]
        self._backoff_s[replica] = min(2 * delay, MAX_BACKOFF_S)
        self._not_before[replica] = time.monotonic() + delay
        self._restart_at[replica] = time.monotonic() + delay + max_extra_s
        return delay

    def allow(self, replica: int) -> None:
        """Nothing stands in the way of the replica's next life but its delay."""
        if replica in self._restart_at:
            self._restart_at[replica] = self._not_before[replica]

    def start_due(self) -> None:
        """Starts the workers whose delay has passed."""
        now = time.monotonic()
        for replica in [replica for replica, at in self._restart_at.items() if at <= now]:
            del self._restart_at[replica]
            self._start(replica)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ends all workers: by closing the pipe that they watch, then by SIGKILL."""
        os.close(self._alive_write)
        os.close(self._alive_read)
        deadline = time.monotonic() + timeout_s
        for worker in filter(None, self.workers):
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            os.close(worker.exit_fd)
            remove_shared_memory(worker.process.pid)


def remove_shared_memory(pid: int) -> None:
    """Removes what torch and CUDA leave in /dev/shm of a process that exported memory and was killed."""
    for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
        for region in Path("/dev/shm").glob(pattern):
            region.unlink(missing_ok=True)
