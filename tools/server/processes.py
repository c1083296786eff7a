"""Processes that end with the one that started them, and that are found by the run directory in their environment."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from ensemble.serving.run_dir import RUN_DIR_VARIABLE

# Runs a program that is terminated when the thread that started it is gone, however it ended (PR_SET_PDEATHSIG).
RUN_UNTIL_PARENT_ENDS = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def spawn(command: list[str], log: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own: Ctrl-C is not for it, and what is in the session is its."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN_UNTIL_PARENT_ENDS, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def limit_file_size(pid: int, num_bytes: int) -> None:
    """Of what a running process writes, and what it starts from now on. A smaller limit stays. Raises OSError."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY or soft > num_bytes:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def how_it_ended(status: int) -> str:
    """In words, of a return code as subprocess has it: negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in signal.valid_signals() else "unknown"
    return f"killed by signal {-status}, {name}"


def status_of_ended(pid: int) -> int | None:
    """The return code of an ended process that its parent has not waited for yet; None if it has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return os.waitstatus_to_exitcode(int(fields[-1])) if state in "ZX" else None


def end_processes(run_dir: Path, grace_s: float, besides: Collection[int] = ()) -> list[int]:
    """Waits for the processes of a run to end; kills those that have not in `grace_s`, and returns their ids."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(pid not in besides for pid in run_pids(run_dir)):
        time.sleep(0.02)
    killed = set()
    while pids := [pid for pid in run_pids(run_dir) if pid not in besides]:  # one may have started another
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        time.sleep(0.01)
    return list(killed)


def run_pids(run_dir: Path) -> Iterable[int]:
    """The live processes of a run, by their environment."""
    mark = f"{RUN_DIR_VARIABLE}={run_dir}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in environment.read_bytes().split(b"\0"):
                yield int(environment.parent.name)


def session_pids(session: int) -> Iterable[int]:
    """The live processes of a session."""
    return [pid for pid, _, its_session in _live_processes() if its_session == session]


def has_children(parent: int) -> bool:
    """Whether a process has a live child."""
    return any(its_parent == parent for _, its_parent, _ in _live_processes())


def _live_processes() -> Iterator[tuple[int, int, int]]:
    """(id, parent's, session) of each, read from /proc; ended ones that wait for their parent do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, _, session = fields[:4]
        if state not in "ZX":
            yield int(stat.parent.name), int(parent), int(session)
