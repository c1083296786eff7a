"""Processes that end with the one that started them, and whose descendants can be found."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

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


def end_session(session: int, grace_s: float) -> None:
    """Waits for the processes of a session to end, and kills those that have not in `grace_s`."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(session_pids(session)):
        time.sleep(0.02)
    for pid in session_pids(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(session_pids(session)):
        time.sleep(0.01)


def session_pids(session: int) -> Iterable[int]:
    """The live processes of a session, read from /proc; ended ones that wait for their parent do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state not in "ZX":
            yield int(stat.parent.name)
