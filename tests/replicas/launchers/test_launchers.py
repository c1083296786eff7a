"""What a stage relies on, whichever launcher starts its workers: the processes are real, but compute nothing."""

import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ensemble.config import Deployment
from ensemble.protocol.curve import CurveKey
from ensemble.replicas.launchers.base import Launcher, RankProcesses, ReplicaStart
from ensemble.replicas.launchers.local import LocalLauncher

DEADLINE_S = 90.0
Start = Callable[..., "Ranks"]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Of a cluster of two nodes on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    size = {"num_cpus": 2, "object_store_memory": 80 << 20}
    head = {**size, "node_name": "first", "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**size, node_name="second")
    yield cluster.address
    cluster.shutdown()


def make_launcher(kind: str, folder: Path, **decode: Any) -> Launcher:
    program = [sys.executable, str(Path(__file__).parent / "fake_rank.py"), str(folder)]
    if kind == "local":
        return LocalLauncher(folder, program)
    from ensemble.replicas.launchers.ray_cluster import RayLauncher

    model = {"path": folder / "model"}
    deployment = Deployment.parse({"model": model, "mode": "colocated", "decode": decode or {"devices": ["cpu"]}})
    return RayLauncher(deployment, "decode", CurveKey.of(b"a secret"), program)


@pytest.fixture(params=["local", "ray"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "model").mkdir()
    if request.param == "ray":
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("ray_address"))
    return str(request.param)


@pytest.fixture
def launcher(kind: str, tmp_path: Path) -> Iterator[Launcher]:
    launcher = make_launcher(kind, tmp_path)
    yield launcher
    launcher.close(timeout_s=0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_something_to_read(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def be_a_stage(kind: str, folder: Path) -> None:
    """Starts a rank, and waits to be killed."""
    launcher = make_launcher(kind, folder)
    socket = zmq.Context().socket(zmq.ROUTER)
    start = ReplicaStart(home="decode", replica=3, life=0, devices=("cpu",), stage_address=launcher.bind(socket))
    launcher.start(start)
    threading.Event().wait()


class Ranks:
    """The processes of one start, and what they say of themselves."""

    def __init__(self, launcher: Launcher, stage: str, folder: Path, devices: tuple[str, ...], life: int) -> None:
        start = ReplicaStart(home="decode", replica=3, life=life, devices=devices, stage_address=stage)
        self.processes: RankProcesses = launcher.start(start)
        self._files = [folder / f"3-{life}-{rank}" for rank in range(len(devices))]

    def called(self, rank: int) -> list[str]:
        """Its process id and how it was called, when it runs."""
        try:
            wait_until(lambda: self._files[rank].exists() or has_something_to_read(self.processes.exit_fd))
        except AssertionError:
            pytest.fail(f"rank {rank} was not called; {self.processes.name} waits for {self.processes.waits_for!r}")
        if not self._files[rank].exists():
            pytest.fail(f"rank {rank} was not called: {self.processes.collect()}")
        return self._files[rank].read_text().split()

    @property
    def pids(self) -> list[int]:
        return [int(self.called(rank)[0]) for rank in range(len(self._files))]

    def end(self) -> str:
        wait_until(lambda: has_something_to_read(self.processes.exit_fd))
        return self.processes.collect()


@pytest.fixture
def start(launcher: Launcher, tmp_path: Path) -> Iterator[Start]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    stage = launcher.bind(socket)
    yield lambda *devices, life=0: Ranks(launcher, stage, tmp_path, devices, life)
    context.destroy(linger=0)


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("kind", ["ray"], indirect=True)
def test_the_places_of_a_pipeline_go_to_several_nodes_where_none_holds_all(kind: str, tmp_path: Path) -> None:
    """The first one on the cluster: it needs both nodes whole, and what ended a moment ago may still count there."""
    launcher = make_launcher(kind, tmp_path, devices=["cpu"] * 4, tp=2, pp=2)
    context = zmq.Context()
    try:
        socket = context.socket(zmq.ROUTER)
        stage = launcher.bind(socket)
        ranks = Ranks(launcher, stage, tmp_path, ("cpu",) * 4, life=0)
        calls = [ranks.called(rank)[1:] for rank in range(4)]
        (group,) = {call[7] for call in calls}
        peers = {call[6] for call in calls}
        assert group.startswith("tcp://") and group not in peers and len(peers) == 4
        assert sorted(ranks.processes.node.split(", ")) == ["first", "second"]
        os.kill(ranks.pids[3], signal.SIGKILL)
        assert ranks.end().endswith("ended (killed by signal 9)")
        assert all(has_ended(pid) for pid in ranks.pids)

        too_large = Ranks(launcher, stage, tmp_path, ("cpu",) * 6, life=1)
        wait_until(lambda: too_large.processes.waits_for == "nodes with 2 CPU and 2 CPU and 2 CPU free")
        too_large.processes.kill()
        too_large.end()
    finally:  # a cluster that goes before this process has left it ends the process
        launcher.close(timeout_s=0.0)
        context.destroy(linger=0)


def test_every_rank_is_told_who_it_is_and_where_the_others_meet(start: Start) -> None:
    ranks = start("cpu", "cpu", life=5)
    calls = [ranks.called(rank)[1:] for rank in range(2)]
    assert [call[:5] for call in calls] == [["decode", "3", "5", str(rank), "cpu,cpu"] for rank in range(2)]
    (stage, peer, group), (same_stage, other_peer, same_group) = calls[0][5:], calls[1][5:]
    assert (stage, group) == (same_stage, same_group)
    assert len({stage, peer, other_peer, group}) == 4


def test_progress_is_that_of_each_rank(start: Start) -> None:
    ranks = start("cpu", "cpu")
    stopped, going = ranks.processes.progress
    wait_until(lambda: stopped.beats > 0 and going.beats > 0 and going.step_s == 0.25)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    last = -1
    while last != stopped.beats:  # one that was on its way
        last, others = stopped.beats, going.beats
        wait_until(lambda others=others: going.beats > others)  # type: ignore[misc]


def test_a_rank_that_ends_is_told_of_and_the_others_end_with_it(start: Start) -> None:
    ranks = start("cpu", "cpu")
    first, second = ranks.pids
    os.kill(second, signal.SIGKILL)
    reason = ranks.end()
    assert f"worker process {second}" in reason and reason.endswith("ended (killed by signal 9)")
    assert has_ended(first) and has_ended(second)


def test_an_exit_status_is_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "fail-1").touch()
    ranks = start("cpu", "cpu")
    reason = ranks.end()
    assert f"worker process {ranks.called(1)[0]}" in reason and reason.endswith("ended (exit status 3)")


def test_a_kill_ends_all_ranks_also_those_that_stand_still(start: Start) -> None:
    ranks = start("cpu", "cpu")
    assert f"worker process {ranks.pids[0]}" in ranks.processes.name
    os.kill(ranks.pids[1], signal.SIGSTOP)
    ranks.processes.kill()
    ranks.processes.kill()
    assert "killed by signal 9" in ranks.end()
    assert all(has_ended(pid) for pid in ranks.pids)


def test_what_a_killed_rank_left_in_shared_memory_goes(start: Start) -> None:
    ranks = start("cpu")
    left = Path(f"/dev/shm/torch_{ranks.pids[0]}_1")
    left.touch()
    ranks.processes.kill()
    ranks.end()
    assert not left.exists()


def test_close_ends_all_that_run(launcher: Launcher, start: Start) -> None:
    ended = start("cpu")
    ended.processes.kill()
    ended.end()
    running = [start("cpu", life=life) for life in (1, 2)]
    os.kill(running[0].pids[0], signal.SIGSTOP)
    pids = [ranks.pids[0] for ranks in running]
    launcher.close(timeout_s=0.5)
    assert all(has_ended(pid) for pid in pids)


def test_a_rank_does_not_outlive_its_stage(kind: str, tmp_path: Path) -> None:
    stage = multiprocessing.get_context("spawn").Process(target=be_a_stage, args=(kind, tmp_path))
    stage.start()
    rank = tmp_path / "3-0-0"
    wait_until(rank.exists)
    stage.kill()
    stage.join()
    wait_until(lambda: has_ended(int(rank.read_text().split()[0])))


def be_a_warden(folder: Path) -> None:
    """Starts a rank, is not asked how it gets on, and has little patience."""
    from ensemble.replicas.launchers import warden

    warden.STAGE_LOST_S = warden.REPORT_S = 0.1
    program = [sys.executable, str(Path(__file__).parent / "fake_rank.py"), str(folder)]
    warden.Warden("127.0.0.1", "", "", program).start(["decode", "3", "0", "0", "cpu", "stage", "peers", "group"])
    threading.Event().wait()


def test_a_warden_that_is_not_asked_ends_with_its_rank(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    process = multiprocessing.get_context("spawn").Process(target=be_a_warden, args=(tmp_path,))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == 1
    rank = tmp_path / "3-0-0"
    assert not rank.exists() or has_ended(int(rank.read_text().split()[0]))


@pytest.mark.parametrize("kind", ["ray"], indirect=True)
def test_a_node_without_the_model_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "model").rmdir()
    reason = start("cpu").end()
    assert re.fullmatch(
        rf"node \S+: model.path = {tmp_path}/model: there is no such folder, which every node needs", reason
    )


@pytest.mark.parametrize("kind", ["ray"], indirect=True)
def test_a_replica_waits_for_a_node_with_room(start: Start) -> None:
    ranks = start("cpu", "cpu", "cpu")
    wait_until(lambda: ranks.processes.waits_for == "a node with 3 CPU free")
    ranks.processes.kill()
    assert ranks.end() == "it was killed before there was room for it"
