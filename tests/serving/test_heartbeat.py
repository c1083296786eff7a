"""Signs of life: a process that ends, fails or stands still is told as such, and one whose watcher was late is not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.serving.heartbeat import read_heartbeats
from ensemble.serving.run_dir import RUN_DIR_VARIABLE
from tools.server import watch
from tools.server.watch import StubWatch

STUB = """
import time
from ensemble.serving import heartbeat
from ensemble.threads import start_vital_thread
heartbeat.start("scheduler")
heartbeat.set_serving(True)
print("started", flush=True)
"""
LIVES = STUB + "time.sleep(600)"
FAILS = STUB + "start_vital_thread(lambda: [][0], 'metrics').join(); time.sleep(600)"


class Stub:
    def __init__(self, source: str, run_dir: Path) -> None:
        environment = {**os.environ, RUN_DIR_VARIABLE: str(run_dir)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "started\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    found = Stub(LIVES, tmp_path)
    yield found
    found.close()


@pytest.fixture
def stub_watch(tmp_path: Path) -> Iterator[StubWatch]:
    found = StubWatch(tmp_path)
    yield found
    found.close()


def reason_within(stub_watch: StubWatch, timeout_s: float) -> str | None:
    """Looks every 0.1 s, as tools.serve does."""
    deadline = time.monotonic() + timeout_s
    while (reason := stub_watch.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return reason


def test_a_stub_that_lives_counts_and_is_not_judged(stub: Stub, stub_watch: StubWatch, tmp_path: Path) -> None:
    [before] = read_heartbeats(tmp_path).values()
    assert reason_within(stub_watch, 2.5) is None
    [after] = read_heartbeats(tmp_path).values()
    assert (after.model, after.pid, after.is_serving, after.reason) == ("scheduler", stub.process.pid, True, "")
    assert after.count > before.count


def test_the_signal_that_ended_a_stub_is_named(stub: Stub, stub_watch: StubWatch) -> None:
    assert stub_watch.poll() is None
    stub.process.send_signal(signal.SIGSEGV)
    expected = f"the scheduler stub (process {stub.process.pid}) ended: killed by signal 11, SIGSEGV"
    assert reason_within(stub_watch, 10) == expected


def test_a_thread_that_fails_ends_its_process_and_is_the_reason(tmp_path: Path, stub_watch: StubWatch) -> None:
    failing = Stub(FAILS, tmp_path)
    expected = "thread metrics: IndexError: list index out of range"
    assert str(reason_within(stub_watch, 10)).endswith(f"ended: {expected}")
    _, log = failing.process.communicate(timeout=10)
    assert failing.process.returncode == 1
    assert log.splitlines()[-1] == f"distserve: error: {expected}", "what tools.serve shows of a failed start"
    failing.close()


def test_a_stub_that_stands_still_is_found(stub: Stub, stub_watch: StubWatch) -> None:
    assert reason_within(stub_watch, 0.5) is None
    stub.process.send_signal(signal.SIGSTOP)
    assert "has stood still for 2 s" in str(reason_within(stub_watch, 30))


def test_a_watcher_that_was_late_does_not_judge(
    stub: Stub, stub_watch: StubWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stops for a minute stops all."""
    clock = time.monotonic()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock)
    assert stub_watch.poll() is None
    stub.process.send_signal(signal.SIGSTOP)
    stub_watch.poll()  # it may have counted once more
    for _ in range(3):
        clock += 60.0
        assert stub_watch.poll() is None
    for _ in range(30):
        clock += 0.1
        reason = stub_watch.poll()
    assert "has stood still" in str(reason)


def test_the_stacks_of_a_stub_are_to_be_had(stub: Stub, stub_watch: StubWatch) -> None:
    stub_watch.print_stacks()
    assert stub.process.stderr is not None
    lines = iter(stub.process.stderr.readline, "")
    assert any("heartbeat.py" in line and "_count" in line for line in lines)
