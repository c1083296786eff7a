"""Fleets of any shape answer as one prefill and one decode replica do, all of their replicas take part, and roles and
drains change that while requests run.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.config import Role
from ensemble.serving.control import Command, call
from ensemble.serving.fleet_table import ChangeRole, DrainReplica, FleetTable, RemoveReplica, UndrainReplica
from tests.serving.clients import Answer, blocks_in_use, read_metrics, run_streams, total
from tests.serving.deployments import deploy
from tools.proofs.faults import Shape, list_fleet
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

NUM_REQUESTS, NUM_CLIENTS = 24, 12
MAX_TOKENS = 60


def requests() -> list[dict[str, Any]]:
    """Greedy and seeded ones, short and long."""
    rng = random.Random(5)
    return [
        {
            "input_ids": [rng.randrange(3, 90) for _ in range(rng.choice([3, 20, 150]))],
            "max_tokens": rng.randint(2, MAX_TOKENS),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.getrandbits(63),
            "ignore_eos": True,
            "stream": True,
            "return_output_ids": True,
            "return_perf_metrics": True,
        }
        for _ in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    shape = Shape.parse("2P2D")
    fields = shape.fields(["cpu"])
    for home in ("prefill", "decode"):
        fields[home] |= {"num_threads": 1}
    fields["prefill"]["max_num_batched_tokens"] = 32  # what would fit into one batch of one replica might go there
    with TritonServer(deploy(tiny_llama, **fields), log_path=tmp_path_factory.mktemp("fleet") / "log") as server:
        server.wait_ready(timeout_s=180)
        shape.assign_roles(server)
        yield server


def outputs(answers: list[Answer]) -> list[list[int]]:
    assert [answer.error for answer in answers if answer.error is not None] == []
    return [answer.output_ids for answer in answers]


def used(answers: list[Answer]) -> set[int]:
    """The replicas that took part in an answer."""
    last = [answer.responses[-1] for answer in answers]
    return {int(each[name][0]) for each in last for name in ("prefill_worker", "decode_worker")} - {-1}


def of_replica(replica: int, metrics: dict[str, float]) -> list[float]:
    return [value for name, value in metrics.items() if f'replica="{replica}"' in name]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def expected(tiny_server: TritonServer) -> list[list[int]]:
    """Of one prefill and one decode replica."""
    return outputs(run_streams(tiny_server.grpc_url, requests(), NUM_CLIENTS))


def assert_all_take_part(server: TritonServer, expected: list[list[int]]) -> None:
    """In one round or in some."""
    took_part: set[int] = set()
    for _ in range(10):
        answers = run_streams(server.grpc_url, requests(), NUM_CLIENTS)
        assert outputs(answers) == expected
        took_part |= used(answers)
        if len(took_part) == 4:
            break
    assert took_part == {row.replica for row in list_fleet(server)} == {0, 1, 2, 3}
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)


def change(server: TritonServer, order: Command[FleetTable]) -> None:
    call(server.run_dir, order, FleetTable, timeout_s=10.0)


def test_every_shape_gives_the_same_answers(server: TritonServer, expected: list[list[int]]) -> None:
    """2P2D, 1P3D, 1P2D and a mixed one, and 2P2D again."""
    assert_all_take_part(server, expected)
    roles: list[Role] = ["decode", "mixed", "prefill"]
    for role in roles:
        change(server, ChangeRole(1, role))
        assert_all_take_part(server, expected)


def test_roles_and_drains_change_under_load(server: TritonServer, expected: list[list[int]]) -> None:
    """Replicas 0 and 1 are of role prefill, 2 and 3 of role decode."""
    stop, rounds = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            rounds.append(run_streams(server.grpc_url, requests(), NUM_CLIENTS))

    load = threading.Thread(target=serve)
    load.start()
    try:
        changes: list[Command[FleetTable]] = [
            ChangeRole(2, "mixed"),
            ChangeRole(0, "decode"),
            DrainReplica(3, within_s=0.0),  # what it has goes on elsewhere at once
            ChangeRole(1, "mixed"),
            UndrainReplica(3),
            ChangeRole(3, "prefill"),
            ChangeRole(2, "decode"),
            RemoveReplica(1, within_s=None),  # when what it has has ended there
        ]
        for each in changes:
            before = len(rounds)
            change(server, each)
            wait_until(lambda before=before: len(rounds) > before or not load.is_alive(), 120.0)  # type: ignore[misc]
        wait_until(lambda: all(row.replica != 1 for row in list_fleet(server)), 60.0)
    finally:
        stop.set()
        load.join(timeout=120)
    last = run_streams(server.grpc_url, requests(), NUM_CLIENTS)
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)
    wait_until(lambda: sum(of_replica(1, read_metrics(server.metrics_url))) == 0, 5.0)
    for answers in [*rounds, last]:
        assert outputs(answers) == expected
    # 0 decodes, 2 decodes, 3 prefills, 1 is gone.
    last_of = [answer.responses[-1] for answer in last]
    assert {int(each["prefill_worker"][0]) for each in last_of} == {3}
    assert {int(each["decode_worker"][0]) for each in last_of} == {0, 2}


def test_sequences_go_over_to_a_replica_that_comes_back(
    tiny_llama: Path, tiny_server: TritonServer, tmp_path: Path
) -> None:
    """Of twelve at the other one two run at a time: whatever a step takes, they get on much faster at two replicas."""
    asked = [each | {"max_tokens": 200} for each in requests()[:NUM_CLIENTS]]
    expected = outputs(run_streams(tiny_server.grpc_url, asked, NUM_CLIENTS))
    fields = Shape.parse("2M").fields(["cpu"])
    fields["decode"] |= {"num_threads": 1, "policy": "mlfq", "max_num_seqs": 2, "max_num_resident_seqs": NUM_CLIENTS}
    fields["decode"] |= {"host_kv_bytes": 32 << 20}
    deployment = deploy(tiny_llama, scheduler={"roles": "auto"}, **fields)
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=180)
        rounds: list[list[Answer]] = []

        def metric(name: str, labels: str = "") -> float:
            return total(read_metrics(server.metrics_url), name, labels)

        for _ in range(10):  # until the replica comes back in the midst of a load, and not behind it
            call(server.run_dir, DrainReplica(1, within_s=None), FleetTable, timeout_s=10.0)
            load = threading.Thread(target=lambda: rounds.append(run_streams(server.grpc_url, asked, NUM_CLIENTS)))
            load.start()
            wait_until(lambda: metric("vllm:num_requests_running") > 2 or not load.is_alive(), 60.0)  # noqa: B023
            call(server.run_dir, UndrainReplica(1), FleetTable, timeout_s=10.0)
            load.join(timeout=120)
            if metric("distserve:moves_total", 'cause="balance"'):
                break
        assert metric("distserve:moves_total", 'cause="balance"') > 0
        assert metric("distserve:recoveries_total") == 0
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)
    for answers in rounds:
        assert outputs(answers) == expected
