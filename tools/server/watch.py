"""Whether every stub of a server lives and goes on, told by its signs of life (ensemble/serving/heartbeat.py)."""

import contextlib
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

from ensemble.serving.heartbeat import STACKS_SIGNAL, Heartbeat, read_heartbeats
from tools.server.processes import how_it_ended, status_of_ended

MAX_STILL_S = 2.0
MAX_STEP_S = 0.25  # a watcher that was itself late does not judge: of a longer time between two looks this much counts


@dataclass(slots=True)
class _Stub:
    pidfd: int | None  # None: it had ended when it was seen first
    count: int
    still_s: float = 0.0


class StubWatch:
    """Looks whenever it is polled, which should be every 0.1 s."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._stubs: dict[int, _Stub] = {}  # by process id
        self._looked_at = time.monotonic()

    def poll(self) -> str | None:
        """Why the server can serve no more."""
        now = time.monotonic()
        step_s = min(now - self._looked_at, MAX_STEP_S)
        self._looked_at = now
        reasons = [self._judge(beat, step_s) for beat in read_heartbeats(self._run_dir).values()]
        return next(filter(None, reasons), None)

    def print_stacks(self) -> None:
        """Has every stub write the stacks of its threads into the server's log."""
        for beat in read_heartbeats(self._run_dir).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, STACKS_SIGNAL)

    def close(self) -> None:
        for stub in self._stubs.values():
            if stub.pidfd is not None:
                os.close(stub.pidfd)
        self._stubs.clear()

    def _judge(self, beat: Heartbeat, step_s: float) -> str | None:
        stub = self._stubs.get(beat.pid)
        if stub is None:
            try:
                pidfd = os.pidfd_open(beat.pid)
            except ProcessLookupError:
                pidfd = None
            stub = self._stubs[beat.pid] = _Stub(pidfd, beat.count)
        stub.still_s = stub.still_s + step_s if stub.count == beat.count else 0.0
        stub.count = beat.count
        name = f"the {beat.model} stub (process {beat.pid})"
        if stub.pidfd is None or has_ended(stub.pidfd):
            status = status_of_ended(beat.pid)
            if status == 0 and stub.still_s < MAX_STILL_S:
                return None  # the server may be stopping it on its way out
            how = beat.reason or (how_it_ended(status) if status is not None else "its parent alone knows how")
            return f"{name} ended: {how}"
        if stub.still_s >= MAX_STILL_S:
            os.kill(beat.pid, STACKS_SIGNAL)
            return f"{name} has stood still for {MAX_STILL_S:.0f} s"
        return None


def has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
