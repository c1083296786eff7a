"""The fleet changes while it serves: no request fails, and every answer is what it would have been."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.serving.control import Command, ControlError, call
from ensemble.serving.fleet_table import (
    AddReplica,
    ChangeRole,
    DrainReplica,
    FleetTable,
    ListFleet,
    RemoveReplica,
    UndrainReplica,
)
from tests.serving.clients import Answer, StreamClient, blocks_in_use, generate, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_cancel import wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

ASKED: dict[str, Any] = {
    "input_ids": [9, 8, 7],
    "max_tokens": 1200,
    "temperature": 0.0,
    "ignore_eos": True,
    "stream": True,
    "return_output_ids": True,
    "return_perf_metrics": True,
}


@pytest.fixture(scope="module")
def server(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(roomy_llama, decode={"devices": ["cpu", "cpu"]})
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("fleet") / "log") as server:
        server.wait_ready(timeout_s=120)
        yield server


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> list[int]:
    return generate(server.grpc_url, **ASKED).output_ids


def ask(server: TritonServer, command: Command[FleetTable]) -> FleetTable:
    return call(server.run_dir, command, FleetTable, timeout_s=10.0)


def num_requests_at(server: TritonServer, replica: int) -> int:
    return next(each.num_requests for each in ask(server, ListFleet()).replicas if each.replica == replica)


def lives(server: TritonServer) -> list[str]:
    return [line for line in server.log_path.read_text().splitlines() if " up, " in line]


def start(server: TritonServer, count: int) -> StreamClient:
    """So many requests that answer by now."""
    client = StreamClient(server.grpc_url)
    for index in range(count):
        client.send("scheduler", str(index), **ASKED)
    wait_until(lambda: all(answer.responses for answer in client.answers.values()), 30.0)
    return client


def finish(client: StreamClient, expected: list[int]) -> list[Answer]:
    answers = list(client.wait().values())
    client.close()
    assert [answer.error for answer in answers] == [None] * len(answers)
    assert all(answer.output_ids == expected for answer in answers)
    return answers


def decoded_at(answers: list[Answer]) -> set[int]:
    return {int(answer.responses[-1]["decode_worker"].reshape(-1)[0]) for answer in answers}


def test_a_drained_replica_ends_what_it_has_and_gets_nothing_new(server: TritonServer, expected: list[int]) -> None:
    running = start(server, 8)
    table = ask(server, DrainReplica(1))
    assert [each.state for each in table.replicas] == ["up", "draining", "up"]
    with pytest.raises(ControlError, match="another replica has to be able"):
        ask(server, DrainReplica(2))
    later = start(server, 3)
    assert decoded_at(finish(later, expected)) == {2}
    assert 1 in decoded_at(finish(running, expected))
    wait_until(lambda: num_requests_at(server, 1) == 0, 10.0)
    ask(server, UndrainReplica(1))
    assert 1 in decoded_at(finish(start(server, 4), expected))


def test_what_a_drain_does_not_wait_for_goes_on_elsewhere(server: TritonServer, expected: list[int]) -> None:
    """With its KV: nothing is computed again. What has ended there meanwhile has ended."""
    running = start(server, 6)
    ask(server, DrainReplica(1, within_s=0.0))
    answers = finish(running, expected)
    assert 2 in decoded_at(answers)
    assert all(int(each.responses[-1]["num_recoveries"].reshape(-1)[0]) == 0 for each in answers)
    wait_until(lambda: num_requests_at(server, 1) == 0, 10.0)
    ask(server, UndrainReplica(1))


def test_roles_change_on_live_processes_under_load(server: TritonServer, expected: list[int]) -> None:
    starts = lives(server)
    clients = []
    for role in ("mixed", "prefill", "decode"):
        clients.append(start(server, 4))
        assert [each.role for each in ask(server, ChangeRole(2, role)).replicas][2] == role
    for client in clients:
        finish(client, expected)
    with pytest.raises(ControlError, match="some replica has to take prompts"):
        ask(server, ChangeRole(0, "decode"))
    assert lives(server) == starts, "none was loaded anew"
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)


def test_replicas_come_and_go(server: TritonServer, expected: list[int]) -> None:
    added = ask(server, AddReplica("cpu", "mixed")).replicas[-1]
    assert (added.replica, added.state) == (3, "loading")
    wait_until(lambda: ask(server, ListFleet()).replicas[-1].state == "up", 60.0)
    assert 3 in decoded_at(finish(start(server, 8), expected))
    ask(server, RemoveReplica(1))
    ask(server, RemoveReplica(3, within_s=0.0))
    wait_until(lambda: {each.replica for each in ask(server, ListFleet()).replicas} == {0, 2}, 10.0)
    finish(start(server, 2), expected)


def test_the_command_shows_the_fleet_and_says_what_it_cannot_do(server: TritonServer) -> None:
    port = server.http_url.rpartition(":")[2]
    environment = os.environ | {"HTTP_PORT": port}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.fleet", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    shown = run("list")
    assert shown.returncode == 0 and "prefill" in shown.stdout and "decode" in shown.stdout
    refused = run("role", "0", "decode")
    assert refused.returncode == 1 and refused.stderr.startswith("error: role = 'decode' is not valid")
    unknown = run("drain", "17")
    assert unknown.returncode == 1 and "replica = 17 is not valid: one of 0, 2" in unknown.stderr
