"""Workers are started, ended and followed: their lives' numbers, and how long a successor waits."""

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.replicas.launchers.local import LocalLauncher, LocalRanks
from ensemble.replicas.supervisor import MAX_BACKOFF_S, MAX_DETACH_S, MIN_BACKOFF_S, STABLE_AFTER_S, Supervisor

REPLICA = 3


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """Of processes that say how they were called, and wait to be killed."""
    program = tmp_path / "python3"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    supervisor = Supervisor("decode", "ipc://stage", LocalLauncher(tmp_path))
    supervisor.add(REPLICA, ("cpu",))
    yield supervisor
    supervisor.stop(timeout_s=0)


def pid_of(supervisor: Supervisor) -> int:
    processes = supervisor.workers[REPLICA].processes
    assert isinstance(processes, LocalRanks)
    return processes.ranks[0].process.pid


def wait_for_end(supervisor: Supervisor) -> tuple[int, str]:
    assert select.select([supervisor.workers[REPLICA].processes.exit_fd], [], [], 5)[0]
    return supervisor.reap(REPLICA)


def start_next(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the time pass until the next life is due."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: max(supervisor.restart_times))
        supervisor.start_due()


def die(supervisor: Supervisor, served_s: float | None, monkeypatch: pytest.MonkeyPatch) -> float:
    """Kills the worker, which has served so long if it was ever up; returns the delay of the next, and starts it."""
    worker = supervisor.workers[REPLICA]
    worker.up_at = None if served_s is None else time.monotonic() - served_s
    pid = pid_of(supervisor)
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(supervisor) == (worker.life, f"worker process {pid} ended (killed by signal 9)")
    delay = supervisor.restart_later(REPLICA)
    start_next(supervisor, monkeypatch)
    return delay


def test_the_delay_doubles_while_workers_die_before_they_serve_or_soon_after(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays = [die(supervisor, served_s, monkeypatch) for served_s in (None, 1.0, None, STABLE_AFTER_S / 2)]
    assert delays == [MIN_BACKOFF_S * 2**n for n in range(4)]
    assert [die(supervisor, None, monkeypatch) for _ in range(5)][-1] == MAX_BACKOFF_S


def test_a_worker_that_has_served_a_while_is_followed_at_once(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        die(supervisor, None, monkeypatch)
    assert die(supervisor, STABLE_AFTER_S + 1, monkeypatch) == MIN_BACKOFF_S


@pytest.mark.parametrize("has_served", [True, False])
def test_the_next_start_waits_for_those_who_map_the_pool_but_not_for_ever(
    supervisor: Supervisor, has_served: bool
) -> None:
    supervisor.workers[REPLICA].up_at = time.monotonic() if has_served else None
    supervisor.kill(REPLICA, "no progress")
    wait_for_end(supervisor)
    before = time.monotonic()
    delay = supervisor.restart_later(REPLICA)
    after = time.monotonic()
    extra_s = MAX_DETACH_S if has_served else 0.0
    assert before + delay + extra_s <= supervisor.restart_times[0] <= after + delay + extra_s
    supervisor.allow(REPLICA)
    assert before + delay <= supervisor.restart_times[0] <= after + delay


def test_lives_are_numbered_across_resets_processes_and_removal(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert supervisor.workers[REPLICA].life == 0
    assert supervisor.new_life(REPLICA) == 1
    assert supervisor.workers[REPLICA].identity == b"3:0", "the process keeps the name of its first life"
    supervisor.kill(REPLICA, "no progress")
    assert wait_for_end(supervisor) == (1, "no progress")
    supervisor.restart_later(REPLICA)
    start_next(supervisor, monkeypatch)
    assert (supervisor.workers[REPLICA].life, supervisor.workers[REPLICA].identity) == (2, b"3:2")
    supervisor.kill(REPLICA, "removed")
    wait_for_end(supervisor)
    assert supervisor.remove(REPLICA) == 2
    assert REPLICA not in supervisor
    supervisor.add(REPLICA, ("cuda:1",))
    assert supervisor.workers[REPLICA].life == 3


def test_the_first_reason_for_a_kill_is_told(supervisor: Supervisor) -> None:
    supervisor.kill(REPLICA, "made no progress")
    supervisor.kill(REPLICA, "was removed")
    assert wait_for_end(supervisor) == (0, "made no progress")
