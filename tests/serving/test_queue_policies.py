"""The prefill queue's policies and deadlines, through the whole server."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.serving.clients import Answer, StreamClient, blocks_in_use, generate, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_cancel import stopped
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

ONE_AT_A_TIME = {"max_num_batched_tokens": 16, "max_num_seqs": 1}
BLOCKER: dict[str, Any] = {"input_ids": [5] * 2000, "max_tokens": 2, "tenant": "busy"}
WAITING: dict[str, dict[str, Any]] = {
    "a": {"input_ids": [7] * 60, "priority": 1, "ttft_target_ms": 20_000.0, "tenant": "busy"},
    "b": {"input_ids": [7] * 40, "priority": -1, "ttft_target_ms": 30_000.0, "tenant": "idle"},
    "c": {"input_ids": [7] * 20, "priority": 2, "ttft_target_ms": 10_000.0, "tenant": "idle"},
}
# Of the policies that go by what a request says beside its length; all are in tests/scheduling/test_policies.py.
STARTED_IN_ORDER = {"priority": "bac", "edf": "cab", "fair": "bca"}


@pytest.mark.parametrize("policy", STARTED_IN_ORDER)
def test_what_waits_behind_a_long_prompt_starts_in_the_order_of_the_policy(
    policy: str, roomy_llama: Path, tmp_path: Path
) -> None:
    deployment = deploy(roomy_llama, prefill=ONE_AT_A_TIME, scheduler={"policy": policy, "aging_s": 20.0})
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, text_input="x", max_tokens=2)
        client = StreamClient(server.grpc_url)
        with stopped(server, "prefill"):  # until all have come
            for index in range(2):
                client.send("scheduler", f"blocker {index}", **BLOCKER)
            wait_until(lambda: sample(server, "num_requests_waiting") == 1, 5.0)
            for name, values in WAITING.items():
                client.send("scheduler", name, max_tokens=1, return_perf_metrics=True, **values)
            wait_until(lambda: sample(server, "num_requests_waiting") == 1 + len(WAITING), 5.0)
        answers = client.wait()
        client.close()
    started = {name: int(answers[name].responses[-1]["first_scheduled_time_ns"][0]) for name in WAITING}
    assert "".join(sorted(started, key=started.__getitem__)) == STARTED_IN_ORDER[policy]


def test_short_prompts_do_not_wait_for_the_whole_of_a_long_one(roomy_llama: Path, tmp_path: Path) -> None:
    prefill = {"max_num_batched_tokens": 32, "max_long_tokens": 16}
    with TritonServer(deploy(roomy_llama, prefill=prefill), log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, text_input="x", max_tokens=2)
        client = StreamClient(server.grpc_url)
        for index in range(4):
            client.send("scheduler", f"long {index}", input_ids=[5] * 2000, max_tokens=1, return_perf_metrics=True)
        client.send("scheduler", "short", input_ids=[7] * 8, max_tokens=1, return_perf_metrics=True)
        answers = client.wait()
        client.close()
    first_token = {name: int(answer.responses[-1]["first_token_time_ns"][0]) for name, answer in answers.items()}
    assert first_token["short"] == min(first_token.values())


LONG_DECODE: dict[str, Any] = {"input_ids": [9, 8, 7], "max_tokens": 7000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def slow_prefill(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    deployment = deploy(roomy_llama, prefill=ONE_AT_A_TIME)
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("server") / "log") as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, text_input="x", max_tokens=2)
        yield server


def send(server: TritonServer, stopped_stage: str | None, num_others: int, **values: Any) -> tuple[Answer, float]:
    """One request behind others, and a stage that stands still until its end: its answer, and how long that took."""
    others, client = StreamClient(server.grpc_url), StreamClient(server.grpc_url)
    with stopped(server, stopped_stage):
        for index in range(num_others):
            others.send("scheduler", str(index), **BLOCKER)
        if num_others:  # streams may overtake each other
            wait_until(lambda: sample(server, "num_requests_waiting") > 0, 5.0)
        start = time.monotonic()
        client.send("scheduler", "only", **values)
        answer = client.wait()["only"]
        seconds = time.monotonic() - start
    assert all(other.error is None for other in others.wait().values())
    client.close()
    others.close()
    return answer, seconds


def sample(server: TritonServer, gauge: str) -> float:
    samples = read_metrics(server.metrics_url).items()
    return sum(value for name, value in samples if name.startswith(f"vllm:{gauge}"))


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("stopped_stage", "num_others", "values", "has_begun"),
    [
        ("prefill", 2, {"input_ids": [7] * 20, "max_tokens": 2, "timeout_ms": 30.0}, False),
        ("prefill", 0, {**LONG_DECODE, "input_ids": [7] * 4000, "max_tokens": 100, "timeout_ms": 100.0}, False),
        (None, 0, {**LONG_DECODE, "timeout_ms": 1000.0}, True),
    ],
    ids=["queued", "in prefill", "in decode"],
)
def test_a_request_past_its_timeout_ends_at_once_wherever_it_is(
    slow_prefill: TritonServer, stopped_stage: str | None, num_others: int, values: dict[str, Any], has_begun: bool
) -> None:
    def expired() -> float:
        samples = read_metrics(slow_prefill.metrics_url).items()
        return sum(value for name, value in samples if name.startswith("distserve:deadline_exceeded_total"))

    before = expired()
    answer, seconds = send(slow_prefill, stopped_stage, num_others, **values)
    assert "deadline exceeded" in str(answer.error)
    assert bool(answer.responses) == has_begun
    assert values["timeout_ms"] / 1e3 <= seconds < 5.0
    wait_until(lambda: expired() == before + 1, 10.0)
    wait_until(lambda: blocks_in_use(read_metrics(slow_prefill.metrics_url)) == 0, 5.0)


def test_a_request_within_its_timeout_is_served(slow_prefill: TritonServer) -> None:
    assert generate(slow_prefill.grpc_url, text_input="x", max_tokens=4, timeout_ms=30_000.0).error is None


def test_over_http_a_timeout_ends_with_an_error_too(slow_prefill: TritonServer) -> None:
    body = json.dumps({"text_input": "x", "max_tokens": 7000, "ignore_eos": True, "timeout_ms": 500.0}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{slow_prefill.http_url}/v2/models/ensemble/generate", body, timeout=30)
    assert caught.value.code == 504
    assert "deadline exceeded" in caught.value.read().decode()


def test_requests_that_name_targets_are_counted_by_whether_they_met_them(tiny_server: TritonServer) -> None:
    def counted(attained: str) -> float:
        metrics = read_metrics(tiny_server.metrics_url)
        return sum(
            value
            for name, value in metrics.items()
            if name.startswith("distserve:slo_requests_total{") and f'attained="{attained}"' in name
        )

    before = {attained: counted(attained) for attained in ("true", "false")}
    for targets in (
        {"ttft_target_ms": 60_000.0, "tpot_target_ms": 60_000.0},
        {"tpot_target_ms": 60_000.0},
        {"ttft_target_ms": 60_000.0, "tpot_target_ms": 1e-3},
        {"ttft_target_ms": 1e-3, "tpot_target_ms": 60_000.0},
        {},
    ):
        generate(tiny_server.grpc_url, text_input="x", max_tokens=4, ignore_eos=True, **targets)
    with pytest.raises(InferenceServerException):
        generate(tiny_server.grpc_url, text_input="x", max_tokens=400, timeout_ms=1.0, ttft_target_ms=60_000.0)
    deadline = time.monotonic() + 5
    while counted("false") < before["false"] + 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (counted("true"), counted("false")) == (before["true"] + 2, before["false"] + 3)
