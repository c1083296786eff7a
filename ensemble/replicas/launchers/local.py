"""Rank processes on this machine, which end with the process that started them."""

import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from ensemble.replicas.launchers.base import GIVE_BACK_MEMORY, WORKER, ReplicaStart, rank_arguments
from ensemble.replicas.progress import Beats, Progress


@dataclass(slots=True, eq=False)
class LocalRank:
    """One process."""

    process: subprocess.Popen[bytes]
    exit_fd: int  # readable when it has ended
    progress: Progress

    @classmethod
    def start(
        cls, program: Sequence[str], arguments: list[str], alive_fd: int, environment: Mapping[str, str] | None = None
    ) -> "LocalRank":
        """alive_fd: of a pipe; its end is the end of the process."""
        progress = Progress()
        fds = [alive_fd, progress.fd]
        command = [*program, *arguments, *map(str, fds)]
        process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=environment)
        os.close(progress.fd)  # its memory stays
        return cls(process, os.pidfd_open(process.pid), progress)

    @property
    def name(self) -> str:
        return f"worker process {self.process.pid}"

    def wait(self, timeout_s: float) -> None:
        """Until it has ended; kills it if that takes longer."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def how_it_ended(self) -> str:
        code = self.process.returncode
        return f"{self.name} ended (" + (f"killed by signal {-code})" if code < 0 else f"exit status {code})")

    def clean_up(self) -> None:
        """Removes what torch and CUDA leave in /dev/shm of a process that exported memory and was killed."""
        os.close(self.exit_fd)
        pid = self.process.pid
        for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
            for region in Path("/dev/shm").glob(pattern):
                region.unlink(missing_ok=True)


class LocalRanks:
    """The processes of a replica."""

    waits_for = node = ""

    def __init__(self, ranks: list[LocalRank]) -> None:
        self.ranks = ranks
        self._exits = select.epoll()
        for rank in ranks:
            self._exits.register(rank.exit_fd, select.EPOLLIN)

    @property
    def exit_fd(self) -> int:
        return self._exits.fileno()

    @property
    def name(self) -> str:
        return self.ranks[0].name

    @property
    def progress(self) -> list[Beats]:
        return [rank.progress for rank in self.ranks]

    @property
    def is_collected(self) -> bool:
        return self._exits.closed

    def kill(self) -> None:
        for rank in self.ranks:
            rank.process.kill()

    def collect(self) -> str:
        ended = [rank for rank in self.ranks if rank.process.poll() is not None]
        self.end(0.0)
        # Ranks miss one of them, and end too: the one that was killed tells more than those that failed for it.
        return min(ended, key=lambda rank: rank.process.returncode >= 0).how_it_ended

    def end(self, timeout_s: float) -> None:
        """Waits for the ends of all; kills those that take longer."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.wait(max(0.0, deadline - time.monotonic()))
            rank.clean_up()
        self._exits.close()


class LocalLauncher:
    """run_dir: private, for the sockets. program: of a rank; none: ensemble.replicas.worker."""

    def __init__(self, run_dir: Path, program: Sequence[str] | None = None) -> None:
        self._run_dir = run_dir
        self._program = program
        self._alive_fds = list(os.pipe())  # the end of the pipe: the stage is gone
        self._started: list[LocalRanks] = []

    def bind(self, socket: "zmq.Socket[bytes]") -> str:
        address = f"ipc://{self._run_dir}/stage"
        socket.bind(address)
        return address

    def start(self, start: ReplicaStart) -> LocalRanks:
        # The interpreter is the one whose packages the Triton server's stub uses: the first python3 on PATH.
        program = self._program or [shutil.which("python3") or "python3", *WORKER]
        peer_address = f"ipc://{self._run_dir}/{start.name}.peer"
        group_address = f"file://{self._run_dir}/{start.name}.group"
        environment = dict(os.environ.items() - GIVE_BACK_MEMORY.items())
        ranks = []
        for rank in range(len(start.devices)):
            arguments = rank_arguments(start, rank, f"{peer_address}.{rank}" if rank else peer_address, group_address)
            ranks.append(LocalRank.start(program, arguments, self._alive_fds[0], environment))
        processes = LocalRanks(ranks)
        self._started = [each for each in self._started if not each.is_collected] + [processes]
        return processes

    def close(self, timeout_s: float) -> None:
        while self._alive_fds:
            os.close(self._alive_fds.pop())
        deadline = time.monotonic() + timeout_s
        for each in self._started:
            if not each.is_collected:
                each.end(max(0.0, deadline - time.monotonic()))
