"""What a stage relies on, whichever launcher starts its workers: the processes are real, but compute nothing."""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ensemble.replicas.launchers.base import Launcher, RankProcesses, ReplicaStart
from ensemble.replicas.launchers.local import LocalLauncher

DEADLINE_S = 30.0


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = LocalLauncher(tmp_path, [sys.executable, str(Path(__file__).parent / "fake_rank.py"), str(tmp_path)])
    yield launcher
    launcher.close(timeout_s=0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Ranks:
    """The processes of one start, and what they say of themselves."""

    def __init__(self, launcher: Launcher, folder: Path, devices: tuple[str, ...], life: int = 0) -> None:
        start = ReplicaStart(home="decode", replica=3, life=life, devices=devices, stage_address="ipc://stage")
        self.processes: RankProcesses = launcher.start(start)
        self._files = [folder / f"3-{life}-{rank}" for rank in range(len(devices))]

    def called(self, rank: int) -> list[str]:
        """Its process id and how it was called, when it runs."""
        wait_until(self._files[rank].exists)
        return self._files[rank].read_text().split()

    @property
    def pids(self) -> list[int]:
        return [int(self.called(rank)[0]) for rank in range(len(self._files))]

    def end(self) -> str:
        assert select.select([self.processes.exit_fd], [], [], DEADLINE_S)[0]
        return self.processes.collect()


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_every_rank_is_told_who_it_is_and_where_the_others_meet(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat", "beat"), life=5)
    calls = [ranks.called(rank)[1:] for rank in range(2)]
    assert [call[:6] for call in calls] == [
        ["decode", "3", "5", str(rank), "beat,beat", "ipc://stage"] for rank in range(2)
    ]
    assert calls[0][6:] == calls[1][6:] and len(set(calls[0][6:])) == 2


def test_progress_is_that_of_each_rank(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat", "beat"))
    stopped, going = ranks.processes.progress
    wait_until(lambda: stopped.beats > 0 and going.beats > 0 and going.step_s == 0.25)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    last = -1
    while last != stopped.beats:  # one that was on its way
        last, others = stopped.beats, going.beats
        wait_until(lambda others=others: going.beats > others + 100)  # type: ignore[misc]


def test_a_rank_that_ends_is_told_of_and_the_others_end_with_it(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat", "beat"))
    first, second = ranks.pids
    os.kill(second, signal.SIGKILL)
    reason = ranks.end()
    assert f"worker process {second}" in reason and reason.endswith("ended (killed by signal 9)")
    assert has_ended(first) and has_ended(second)


def test_an_exit_status_is_told(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat", "fail"))
    reason = ranks.end()
    assert f"worker process {ranks.called(1)[0]}" in reason and reason.endswith("ended (exit status 3)")


def test_a_kill_ends_all_ranks_also_those_that_stand_still(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat", "beat"))
    assert f"worker process {ranks.pids[0]}" in ranks.processes.name
    os.kill(ranks.pids[1], signal.SIGSTOP)
    ranks.processes.kill()
    ranks.processes.kill()
    assert "killed by signal 9" in ranks.end()
    assert all(has_ended(pid) for pid in ranks.pids)


def test_what_a_killed_rank_left_in_shared_memory_goes(launcher: Launcher, tmp_path: Path) -> None:
    ranks = Ranks(launcher, tmp_path, ("beat",))
    left = Path(f"/dev/shm/torch_{ranks.pids[0]}_1")
    left.touch()
    ranks.processes.kill()
    ranks.end()
    assert not left.exists()


def test_close_ends_all_that_run(launcher: Launcher, tmp_path: Path) -> None:
    ended = Ranks(launcher, tmp_path, ("fail",))
    ended.end()
    running = [Ranks(launcher, tmp_path, ("beat",), life) for life in (1, 2)]
    os.kill(running[0].pids[0], signal.SIGSTOP)
    pids = [ranks.pids[0] for ranks in running]
    launcher.close(timeout_s=0.5)
    assert all(has_ended(pid) for pid in pids)
