"""A stage whose workers are on the nodes of a Ray cluster: nodes that are lost, and come back.

Two nodes on this machine; the worker processes are real, but compute nothing (fake_worker.py).
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.config import Deployment
from ensemble.protocol.router_replica import ReplicaDown, ReplicaWaits, StartReplica
from ensemble.serving.home import Home
from tests.serving.test_home import Router

ray_cluster = pytest.importorskip("ensemble.replicas.launchers.ray_cluster")
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Of two nodes, with room for one worker on each."""
    from ray.cluster_utils import Cluster

    head = {**NODE, "node_name": "left", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE, node_name="right")
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start_home(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Home]]:
    """With a replica on each node, and a folder of the model."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    program = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]
    launcher = functools.partial(ray_cluster.RayLauncher, program=program)
    monkeypatch.setattr(ray_cluster, "RayLauncher", launcher)
    homes: list[Home] = []

    def start(model: Path) -> Home:
        decode = {"devices": ["cpu", "cpu"]}
        raw = {"model": {"path": model}, "mode": "colocated", "launcher": "ray", "decode": decode}
        homes.append(Home("decode", Deployment.parse(raw)))
        return homes[-1]

    yield start
    for home in homes:
        home.close()


def test_a_lost_node_is_a_lost_replica_which_comes_back_with_the_node(
    cluster: Any, start_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = start_home(tmp_path)
    home.wait_until_up()
    router = Router(home)
    ups = {up.node: up for up in router.up(2)}
    assert ups.keys() == {"left", "right"}
    for up in ups.values():
        router.wait_for_event(up, f"for {up.replica}")
    [right] = cluster.worker_nodes
    cluster.remove_node(right)
    [down] = router.wait_for(ReplicaDown)
    assert isinstance(down, ReplicaDown) and down.replica == ups["right"].replica
    assert down.reason.startswith("node right was lost")
    router.wait_for_event(ups["left"], "still there")
    router.send(StartReplica(replica=down.replica))
    [waits] = router.wait_for(ReplicaWaits)
    assert waits == ReplicaWaits(replica=down.replica, waits_for="a node with 1 CPU free")
    cluster.add_node(**NODE, node_name="new")
    [again] = router.up()
    assert (again.replica, again.life, again.node) == (down.replica, 1, "new")
    router.wait_for_event(again, "hello")
