"""The server with its replicas on two nodes of a Ray cluster: one of them is lost under load, and another one comes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble.engine.engine import load_engine
from ensemble.request import Request, SamplingParams
from ensemble.serving.fleet_table import ReplicaRow
from tests.serving.clients import StreamClient, read_metrics, total
from tests.serving.deployments import deploy
from tools.offline import generate
from tools.proofs.faults import list_fleet
from tools.server.triton_server import TritonServer

cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.server
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
PREFILL, NEAR, FAR = 0, 1, 2  # replicas: two go to one node, for which there is room, and the third to the other
ASKED: dict[str, Any] = {
    "input_ids": [5] * 40,
    "temperature": 0.0,
    "ignore_eos": True,
    "stream": True,
    "return_output_ids": True,
    "return_perf_metrics": True,
}
RANK = {"num_threads": 1, "kv_cache_bytes": 64 << 20}
SHORT, LONG = 50, 2500  # tokens; long ones are under way when a node is lost


@dataclass(frozen=True)
class Nodes:
    """Two nodes on this machine, and a head that takes no rank."""

    cluster: Any
    by_name: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str) -> None:
        self.by_name[name] = self.cluster.add_node(**NODE, node_name=name)

    def lose(self, name: str) -> None:
        self.cluster.remove_node(self.by_name.pop(name))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    nodes = Nodes(cluster)
    nodes.add("left")
    nodes.add("right")
    yield nodes
    cluster.shutdown()


@contextmanager
def serving(nodes: Nodes, model: Path, log: Path, **decode: Any) -> Iterator[TritonServer]:
    deployment = deploy(model, launcher="ray", prefill=RANK, decode={**RANK, **decode})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        with TritonServer(deployment, log_path=log) as server:
            server.wait_ready(timeout_s=120)
            yield server


@pytest.fixture(scope="module")
def server(nodes: Nodes, roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serving(nodes, roomy_llama, tmp_path_factory.mktemp("ray") / "log", devices=["cpu", "cpu"]) as server:
        yield server


def replicas(server: TritonServer) -> dict[int, ReplicaRow]:
    return {row.replica: row for row in list_fleet(server)}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(server: TritonServer, count: int, max_tokens: int) -> StreamClient:
    """So many requests that answer by now."""
    client = StreamClient(server.grpc_url)
    for index in range(count):
        client.send("scheduler", str(index), **ASKED, max_tokens=max_tokens)
    wait_until(lambda: all(answer.responses for answer in client.answers.values()))
    return client


def finish(client: StreamClient) -> tuple[set[tuple[int, ...]], set[int]]:
    """The outputs of its requests, none of which has failed, and where they ended."""
    answers = list(client.wait().values())
    client.close()
    assert [answer.error for answer in answers] == [None] * len(answers)
    at = {int(answer.responses[-1]["decode_worker"].reshape(-1)[0]) for answer in answers}
    return {tuple(answer.output_ids) for answer in answers}, at


def test_a_replica_too_large_for_any_node_runs_on_several(nodes: Nodes, roomy_llama: Path, tmp_path: Path) -> None:
    """Two places of two ranks, each on a node of its own, and prefill on a third; they answer as one process does."""
    nodes.add("third")
    with serving(nodes, roomy_llama, tmp_path / "log", devices=["cpu"] * 4, tp=2, pp=2) as server:
        outputs, _ = finish(start(server, 3, SHORT))
        at_nodes = replicas(server)[1].node.split(", ")
    nodes.lose("third")
    assert len(at_nodes) == 2 and set(at_nodes) < {"left", "right", "third"}
    alone = deploy(roomy_llama)
    sampling = SamplingParams(max_tokens=SHORT, temperature=0.0, ignore_eos=True)
    request = Request(request_id=0, prompt_token_ids=ASKED["input_ids"], sampling=sampling)
    done = generate(load_engine(alone, alone.decode, torch.device("cpu")), [request])
    assert outputs == {tuple(done[0].output_token_ids)}


def test_prefill_and_decode_share_a_node_and_kv_goes_to_the_other_one_too(server: TritonServer) -> None:
    at_node = {replica: row.node for replica, row in replicas(server).items()}
    assert at_node[PREFILL] == at_node[NEAR]
    assert {at_node[NEAR], at_node[FAR]} == {"left", "right"}
    outputs, at = finish(start(server, 6, SHORT))
    assert len(outputs) == 1 and at == {NEAR, FAR}


def test_a_node_that_is_lost_under_load_fails_no_request_and_its_replica_comes_back(
    nodes: Nodes, server: TritonServer
) -> None:
    expected = finish(start(server, 1, LONG))[0]
    running = start(server, 6, LONG)
    nodes.lose(replicas(server)[FAR].node)
    assert finish(running) == (expected, {NEAR})
    assert total(read_metrics(server.metrics_url), "distserve:recoveries_total", "death") > 0
    wait_until(lambda: replicas(server)[FAR].state == "pending")
    outputs, at = finish(start(server, 2, SHORT))
    assert len(outputs) == 1 and at == {NEAR}

    nodes.add("new")
    wait_until(lambda: replicas(server)[FAR].state == "up")
    assert replicas(server)[FAR].node == "new"
    assert finish(start(server, 6, SHORT)) == (outputs, {NEAR, FAR})
