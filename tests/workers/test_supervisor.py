"""How long a worker's successor waits: longer and longer in a crash loop, shortly after a life that served."""

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.workers.supervisor import MAX_BACKOFF_S, MIN_BACKOFF_S, STABLE_AFTER_S, Supervisor


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """Of processes that only wait to be killed."""
    program = tmp_path / "python3"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    supervisor = Supervisor("decode", 1, "ipc://unused", tmp_path)
    yield supervisor
    supervisor.stop(timeout_s=0)


def die(supervisor: Supervisor, served_s: float | None) -> float:
    """Kills the worker, which has served so long if it was ever up; returns the delay of the next, and starts it."""
    worker = supervisor.workers[0]
    assert worker is not None
    worker.up_at = None if served_s is None else time.monotonic() - served_s
    supervisor.kill(0, worker.epoch)
    assert select.select([worker.exit_fd], [], [], 5)[0]
    assert supervisor.reap(worker.exit_fd)[:2] == (0, worker.epoch)
    delay = supervisor.restart_later(0)
    supervisor._restart_at[0] = time.monotonic()
    supervisor.start_due()
    return delay


def test_the_delay_doubles_while_workers_die_before_they_serve_or_soon_after(supervisor: Supervisor) -> None:
    delays = [die(supervisor, served_s) for served_s in (None, 1.0, None, STABLE_AFTER_S / 2)]
    assert delays == [MIN_BACKOFF_S * 2**n for n in range(4)]
    assert [die(supervisor, None) for _ in range(5)][-1] == MAX_BACKOFF_S


def test_a_worker_that_has_served_a_while_is_followed_at_once(supervisor: Supervisor) -> None:
    for _ in range(4):
        die(supervisor, None)
    assert die(supervisor, STABLE_AFTER_S + 1) == MIN_BACKOFF_S
