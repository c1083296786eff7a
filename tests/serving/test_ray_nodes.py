"""The server with its replicas on two nodes of a Ray cluster: one of them is lost under load, and another one comes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.serving.fleet_table import ReplicaRow
from tests.serving.clients import StreamClient
from tests.serving.deployments import deploy
from tools.proofs.faults import list_fleet
from tools.server.triton_server import TritonServer

cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.server
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
PREFILL, NEAR, FAR = 0, 1, 2  # replicas: two go to one node, for which there is room, and the third to the other
ASKED = {"input_ids": [5] * 40, "max_tokens": 150, "ignore_eos": True, "stream": True, "return_output_ids": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Of two nodes on this machine, and a head that takes no rank."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    for name in ("left", "right"):
        cluster.add_node(**NODE, node_name=name)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def server(cluster: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    cpu = {"num_threads": 1, "kv_cache_bytes": 4 << 20}
    deployment = deploy(tiny_llama, launcher="ray", prefill=cpu, decode={**cpu, "devices": ["cpu", "cpu"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        with TritonServer(deployment, log_path=tmp_path_factory.mktemp("ray") / "log") as server:
            server.wait_ready(timeout_s=120)
            yield server


def replicas(server: TritonServer) -> dict[int, ReplicaRow]:
    return {row.replica: row for row in list_fleet(server)}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(server: TritonServer, count: int) -> StreamClient:
    """So many requests that answer by now."""
    client = StreamClient(server.grpc_url)
    for index in range(count):
        client.send("scheduler", str(index), **ASKED)
    wait_until(lambda: all(answer.responses for answer in client.answers.values()))
    return client


def finish(client: StreamClient) -> tuple[set[tuple[int, ...]], set[int]]:
    """The outputs of its requests, none of which has failed, and where they ended."""
    answers = list(client.wait().values())
    client.close()
    assert [answer.error for answer in answers] == [None] * len(answers)
    at = {int(answer.responses[-1]["decode_worker"].reshape(-1)[0]) for answer in answers}
    return {tuple(answer.output_ids) for answer in answers}, at


def test_a_node_that_is_lost_under_load_fails_no_request_and_its_replica_comes_back(
    cluster: Any, server: TritonServer
) -> None:
    nodes = {replica: row.node for replica, row in replicas(server).items()}
    assert nodes[PREFILL] == nodes[NEAR], "prefill and decode of the same number share a node"
    assert {nodes[NEAR], nodes[FAR]} == {"left", "right"}
    expected, at = finish(start(server, 6))
    assert len(expected) == 1 and at == {NEAR, FAR}, "KV goes from node to node"

    running = start(server, 8)
    [lost] = [node for node in cluster.worker_nodes if node.node_name == nodes[FAR]]
    cluster.remove_node(lost)
    assert finish(running) == (expected, {NEAR})
    wait_until(lambda: replicas(server)[FAR].state == "pending")
    assert finish(start(server, 2)) == (expected, {NEAR})

    cluster.add_node(**NODE, node_name="new")
    wait_until(lambda: replicas(server)[FAR].state == "up")
    assert replicas(server)[FAR].node == "new"
    assert finish(start(server, 6)) == (expected, {NEAR, FAR})
