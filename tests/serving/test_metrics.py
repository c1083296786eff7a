"""The metrics port agrees with what clients count."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ensemble.serving.metric_families import FAMILIES, ITL
from tests.serving.clients import Answer, StreamClient, generate, read_metrics, total
from tests.serving.deployments import deploy
from tests.serving.test_cancel import sample, stopped, wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

MAX_WAITING = 12
RETURNED = ["return_finish_reason", "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics"]
COUNTS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "distserve:deadline_exceeded_total": "deadlines",
    "vllm:request_queue_time_seconds_count": "started",
    "vllm:time_to_first_token_seconds_count": "had_a_first_token",
    "distserve:bridge_time_seconds_count": "went_to_decode",
    "distserve:kv_transfer_time_seconds_count": "arrived_in_decode",
    "vllm:request_time_per_output_token_seconds_count": "had_two_tokens",
    "vllm:e2e_request_latency_seconds_count": "finished",
}


@pytest.fixture(scope="module")
def server(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    scheduler = {"max_queue_requests": MAX_WAITING, "first_token": "at_once"}
    deployment = deploy(roomy_llama, prefill={"max_num_seqs": 1}, scheduler=scheduler)
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("server") / "log") as server:
        server.wait_ready(timeout_s=120)
        yield server


class Tally:
    """What the clients of a test saw."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def finished(self, responses: list[dict[str, Any]]) -> None:
        last = responses[-1]
        num_output_tokens = sum(int(each["num_output_tokens"]) for each in responses)
        went_to_decode = int(last["decode_worker"]) >= 0
        self.add(
            started=1,
            had_a_first_token=1,
            finished=1,
            prompt_tokens=int(last["num_input_tokens"]),
            output_tokens=num_output_tokens,
            had_two_tokens=num_output_tokens > 1,
            went_to_decode=went_to_decode,
            arrived_in_decode=went_to_decode,
            **{str(last["finish_reason"]): 1},
        )

    def failed(self, message: str) -> None:
        marks = {"is not valid": "INVALID_ARG", "overloaded": "UNAVAILABLE", "deadline exceeded": "CANCELLED"}
        (code,) = [code for mark, code in marks.items() if mark in message]
        self.add(deadlines="deadline exceeded" in message, **{code: 1})

    def answered(self, answer: Answer) -> None:
        """One that came over gRPC."""
        if answer.error is not None:
            self.failed(str(answer.error))
            return
        scalars = [{name: array.reshape(-1)[0] for name, array in each.items()} for each in answer.responses]
        scalars[-1]["finish_reason"] = scalars[-1]["finish_reason"].decode()
        self.finished(scalars)


def post(server: TritonServer, model: str, asked: dict[str, Any], tally: Tally) -> None:
    endpoint = "generate_stream" if asked.get("stream") else "generate"
    url = f"{server.http_url}/v2/models/{model}/{endpoint}"
    try:
        with urllib.request.urlopen(url, json.dumps(asked).encode(), timeout=60) as response:
            events = response.read().strip().split(b"\n\n")
    except urllib.error.HTTPError as error:
        tally.failed(error.read().decode())
        return
    tally.finished([json.loads(event.removeprefix(b"data: ")) for event in events])


def mixed_requests() -> list[dict[str, Any]]:
    """Good and bad ones, streaming and not, ending with their first token, at their length and at a stop string."""
    good = [
        {"text_input": "The capital " * (1 + index % 5), "max_tokens": 1 + 7 * (index % 4), "stream": index % 2 == 0}
        for index in range(24)
    ]
    at_a_stop_string = {"text_input": "The capital", "max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
    stopping = [{**at_a_stop_string, "stop_words": ["never in the text", "st"], "stream": i % 2 == 0} for i in range(4)]
    bad = [{"text_input": "x", "max_tokens": 0}, {"text_input": ""}, {"text_input": "x", "top_p": 2.0}]
    return [*good, *stopping, *bad, *bad]


def run_mixed_load(server: TritonServer, tally: Tally) -> None:
    """Eight clients at a time, half of them on HTTP; each front and each model sees every request."""

    def over_grpc(model: str, requests: list[dict[str, Any]]) -> None:
        for asked in requests:
            client = StreamClient(server.grpc_url)
            client.send(model, "0", **asked)
            tally.answered(client.wait()["0"])
            client.close()

    def over_http(model: str, requests: list[dict[str, Any]]) -> None:
        for asked in requests:
            post(server, model, asked, tally)

    requests = [asked | dict.fromkeys(RETURNED, True) for asked in mixed_requests()]
    threads = [
        threading.Thread(target=run, args=(model, requests[part::2]))
        for run in (over_grpc, over_http)
        for model in ("scheduler", "ensemble")
        for part in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)


def run_with_a_full_queue(server: TritonServer, tally: Tally) -> None:
    """Prefill stands still: of those that wait some leave, some have a deadline, and whoever comes then is refused."""
    asked = {"text_input": "The capital", "max_tokens": 9, **dict.fromkeys(RETURNED, True)}
    staying, leaving = StreamClient(server.grpc_url), StreamClient(server.grpc_url)
    in_a_hurry = [StreamClient(server.grpc_url) for _ in range(2)]
    with stopped(server, "prefill"):
        for index in range(2):
            staying.send("scheduler", str(index), **asked)
        wait_until(lambda: sample(server, "vllm:num_requests_running") == 2, 5.0)
        for index in range(MAX_WAITING - 2):
            (leaving if index % 2 else staying).send("ensemble", f"{index} waits", **asked)
        for client, model in zip(in_a_hurry, ("scheduler", "ensemble"), strict=True):
            client.send(model, "0", timeout_ms=3_000.0, **asked)
        wait_until(lambda: sample(server, "vllm:num_requests_waiting") == MAX_WAITING, 10.0)
        for model in ("scheduler", "ensemble", "ensemble"):
            client = StreamClient(server.grpc_url)
            client.send(model, "0", **asked)
            tally.answered(client.wait()["0"])
            client.close()
        leaving.close(cancel=True)
        tally.add(CANCELLED=len(leaving.answers))
        wait_until(lambda: sample(server, "distserve:deadline_exceeded_total") == 2, 5.0)
    for client in (staying, *in_a_hurry):
        for answer in client.wait().values():
            tally.answered(answer)
        client.close()


def run_until_transfer(server: TritonServer, tally: Tally) -> None:
    """Decode stands still: clients leave when they have their first token, while their KV waits to be pulled."""
    asked = {"text_input": "The capital", "max_tokens": 9, "temperature": 0.0, "ignore_eos": True, "stream": True}
    asked |= dict.fromkeys(["return_num_input_tokens", "return_num_output_tokens"], True)
    leaving = StreamClient(server.grpc_url)
    with stopped(server, "decode"):
        for index in range(4):
            leaving.send("ensemble" if index % 2 else "scheduler", str(index), **asked)
        wait_until(lambda: all(answer.responses for answer in leaving.answers.values()), 5.0)
        generate(server.grpc_url, text_input="x", max_tokens=1, ignore_eos=True)  # by then all are submitted to decode
        tally.add(started=1, had_a_first_token=1, finished=1, prompt_tokens=2, output_tokens=1, length=1)
        leaving.close(cancel=True)
        for answer in leaving.answers.values():
            (response,) = answer.responses
            tally.add(
                CANCELLED=1,
                started=1,
                had_a_first_token=1,
                went_to_decode=1,
                prompt_tokens=int(response["num_input_tokens"].reshape(-1)[0]),
                output_tokens=int(response["num_output_tokens"].reshape(-1)[0]),
            )
        wait_until(lambda: sample(server, 'distserve:request_errors_total{code="CANCELLED"') == 11, 10.0)


def counted(server: TritonServer) -> Counter[str]:
    """The same counts, of the metrics port."""
    counts: Counter[str] = Counter()
    for name, value in read_metrics(server.metrics_url).items():
        family = name.partition("{")[0]
        if family in COUNTS:
            counts[COUNTS[family]] += int(value)
        for kind in ("stop", "length"):
            counts[kind] += int(value) if f'finished_reason="{kind}"' in name else 0
        for code in ("INVALID_ARG", "UNAVAILABLE", "CANCELLED"):
            counts[code] += int(value) if family == "distserve:request_errors_total" and f'"{code}"' in name else 0
    return +counts


def wait_for_counts(server: TritonServer, expected: Counter[str]) -> None:
    with contextlib.suppress(AssertionError):  # the next line shows the difference
        wait_until(lambda: counted(server) == expected, 5.0)
    assert counted(server) == expected


def test_every_metric_is_there_before_the_first_request(server: TritonServer, roomy_llama: Path) -> None:
    """The first test of this server; by another's reading of Prometheus's format."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(page.read().decode()))
    ours = {family.name: family for family in families if not family.name.startswith("nv_")}
    assert len(ours) < len(families), "the Triton server's own are there too"
    kinds = {f"{name}_total" if family.type == "counter" else name: family.type for name, family in ours.items()}
    assert kinds == {name: family.kind for name, family in FAMILIES.items()}
    for name, family in ours.items():
        assert family.samples, name
        assert {sample.labels["model_name"] for sample in family.samples} == {roomy_llama.name}
    counters = [sample for family in ours.values() if family.type != "gauge" for sample in family.samples]
    assert {sample.value for sample in counters} == {0.0}
    up = [(each.labels["stage"], each.value) for each in ours["distserve:replica_up"].samples]
    assert up == [("prefill", 1.0), ("decode", 1.0)]


def test_totals_equal_what_the_clients_count(server: TritonServer) -> None:
    tally = Tally()
    for run in (run_mixed_load, run_with_a_full_queue, run_until_transfer):
        run(server, tally)
        wait_for_counts(server, +tally.counts)
    assert all(tally.counts[name] for name in [*COUNTS.values(), "stop", "length", "INVALID_ARG", "UNAVAILABLE"])


def blocks_taken(server: TritonServer, stage: str) -> float:
    labels = f'stage="{stage}"'
    samples = [(name, value) for name, value in read_metrics(server.metrics_url).items() if labels in name]
    free = sum(value for name, value in samples if name.startswith("distserve:kv_blocks_free{"))
    return sum(value for name, value in samples if name.startswith("distserve:kv_blocks{")) - free


def test_the_gauge_of_free_blocks_falls_when_blocks_are_taken(server: TritonServer) -> None:
    client = StreamClient(server.grpc_url)
    with stopped(server, "decode"):
        client.send("scheduler", "0", input_ids=[9] * 40, max_tokens=8000, ignore_eos=True)
        wait_until(lambda: blocks_taken(server, "prefill") == 3, 5.0)  # of 16 tokens, until decode has its copy
    wait_until(lambda: blocks_taken(server, "decode") > 3, 5.0)  # those, and more as the answer grows
    wait_until(lambda: blocks_taken(server, "prefill") == 0, 5.0)
    client.close(cancel=True)
    wait_until(lambda: blocks_taken(server, "decode") == 0, 10.0)


def test_every_gap_between_tokens_counts(server: TritonServer) -> None:
    """Whether its client sees it or not."""
    for stream in (False, True):
        before, started = read_metrics(server.metrics_url), time.monotonic()
        generate(server.grpc_url, input_ids=[9] * 40, max_tokens=25, ignore_eos=True, stream=stream)
        seen_s, after = time.monotonic() - started, read_metrics(server.metrics_url)
        count, seconds = (total(after, f"{ITL}_{end}") - total(before, f"{ITL}_{end}") for end in ("count", "sum"))
        assert count == 24
        assert 0 < seconds < seen_s


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_the_last_token_counts_as_a_stop(server: TritonServer, stream: bool) -> None:
    asked = {"text_input": "The capital", "max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "stream": stream}
    asked |= dict.fromkeys(RETURNED, True)
    before = counted(server)
    whole = generate(server.grpc_url, **asked)
    at_the_end = generate(server.grpc_url, stop_words=[whole.text], **asked)
    assert (whole.finish_reason, at_the_end.finish_reason, at_the_end.text) == ("length", "stop", "")
    expected = {"finished": 2, "length": 1, "stop": 1, "output_tokens": 40}
    wait_until(lambda: {name: counted(server)[name] - before[name] for name in expected} == expected, 10.0)
