"""Spans of requests, as a collector gets them that reads OTLP by OpenTelemetry's own messages."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from ensemble.router.lives import Timeline
from ensemble.serving.ended_request import Ended
from ensemble.serving.traces import MAX_BATCH, MAX_QUEUED, Traces, phases, spans_url
from tests.serving.clients import StreamClient, make_inputs
from tests.serving.deployments import deploy
from tests.serving.test_cancel import wait_until
from tools.server.ports import free_ports
from tools.server.triton_server import TritonServer

PHASES = ["queue", "prefill", "bridge", "transfer", "decode"]
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


class Collector(ThreadingHTTPServer):
    """Keeps the spans of each trace; `goes_on` holds its answers back while it is not set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.traces: dict[str, list[Span]] = {}
        self.resources: list[dict[str, str]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        for of_resource in request.resource_spans:
            self.resources.append({each.key: each.value.string_value for each in of_resource.resource.attributes})
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                self.traces.setdefault(span.trace_id.hex(), []).append(span)

    def spans_of(self, trace_id: str) -> dict[str, Span]:
        """By name, when the request's own has come; they leave together."""
        wait_until(lambda: trace_id in self.traces, 10.0)
        assert all(count == 1 for count in Counter(span.name for span in self.traces[trace_id]).values())
        return {span.name: span for span in self.traces[trace_id]}


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.goes_on.wait(30)
        is_ours = (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
        if is_ours:
            self.server.take(ExportTraceServiceRequest.FromString(body))
        self.send_response(200 if is_ours else 400)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    with Collector() as found:
        threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        yield found
        found.goes_on.set()
        found.shutdown()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as found:
        yield found


@pytest.fixture
def own_collector() -> Iterator[Collector]:
    """To which no server sends."""
    with running_collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(roomy_llama: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(roomy_llama, otlp_endpoint=collector.url)
    log_path = tmp_path_factory.mktemp("traces") / "log"
    with TritonServer(deployment, openai_port=free_ports(1)[0], log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        yield server


def parent(number: int, is_sampled: bool = True) -> tuple[str, str, str]:
    """A traceparent with its trace's and its span's id."""
    trace_id, span_id = f"{number:032x}", f"{number + 7:016x}"
    return f"00-{trace_id}-{span_id}-{is_sampled:02x}", trace_id, span_id


def post(url: str, body: dict[str, Any], **headers: str) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def numbers_of(span: Span) -> dict[str, float]:
    return {each.key: each.value.int_value or each.value.double_value for each in span.attributes}


def check(spans: dict[str, Span], span_id: str) -> None:
    """A child of the client's span, divided into its phases without a gap."""
    request = spans["llm_request"]
    assert request.parent_span_id.hex() == span_id
    assert request.kind == Span.SPAN_KIND_SERVER
    assert list(spans) == [*PHASES, "llm_request"]
    assert {spans[name].parent_span_id for name in PHASES} == {request.span_id}
    time_ns = request.start_time_unix_nano
    for name in PHASES:
        assert spans[name].start_time_unix_nano == time_ns
        time_ns = spans[name].end_time_unix_nano
        assert time_ns > spans[name].start_time_unix_nano
    assert request.end_time_unix_nano > time_ns
    assert numbers_of(spans["transfer"])["distserve.kv_bytes"] > 0
    assert [numbers_of(spans[name])["distserve.replica"] for name in ("prefill", "decode")] == [0, 1]
    assert numbers_of(request)["gen_ai.usage.completion_tokens"] == 12


@pytest.mark.server
def test_the_clients_span_goes_on_over_http(server: TritonServer, collector: Collector) -> None:
    """And the phases are those that the client gets itself."""
    header, trace_id, span_id = parent(1)
    for model in ("ensemble", "vllm_model"):
        url = f"{server.http_url}/v2/models/{model}/generate"
        answer = post(url, {"text_input": "The capital", "return_perf_metrics": True, **ASKED}, traceparent=header)
        if model == "ensemble":
            spans = collector.spans_of(trace_id)
            check(spans, span_id)
            ends = {name: spans[name].end_time_unix_nano for name in PHASES}
            points = ("first_scheduled", "first_token", "decode_submitted", "decode_joined", "last_token")
            assert list(ends.values()) == [answer[f"{point}_time_ns"] for point in points]
            assert spans["queue"].start_time_unix_nano == answer["arrival_time_ns"]
            names = {"service.name": "distserve"}
            assert names.items() <= collector.resources[-1].items()
        header, trace_id, span_id = parent(2)
    check(collector.spans_of(trace_id), span_id)


@pytest.mark.server
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
def test_over_grpc_it_is_a_request_parameter(server: TritonServer, collector: Collector, model: str) -> None:
    header, trace_id, span_id = parent(10 + len(model))
    client = StreamClient(server.grpc_url)
    inputs = make_inputs(batched=model == "ensemble", text_input="The capital", **ASKED)
    client.send_inputs(model, "mine", inputs, parameters={"traceparent": header})
    assert client.wait()["mine"].error is None
    client.close()
    spans = collector.spans_of(trace_id)
    check(spans, span_id)
    ids = [each.value.string_value for each in spans["llm_request"].attributes if each.key == "gen_ai.request.id"]
    assert ids == ["mine"]


@pytest.mark.server
def test_the_openai_front_hands_it_on(server: TritonServer, collector: Collector) -> None:
    header, trace_id, span_id = parent(30)
    asked = {"model": server.deployment.model.name, "prompt": "The capital", "max_tokens": 12, "temperature": 0}
    post(f"{server.openai_url}/completions", {**asked, "ignore_eos": True}, Traceparent=header)
    check(collector.spans_of(trace_id), span_id)


@pytest.mark.server
def test_errors_and_traces_that_nobody_wants(server: TritonServer, collector: Collector) -> None:
    refused, timed_out, unsampled = parent(40), parent(41), parent(42, is_sampled=False)
    url = f"{server.http_url}/v2/models/ensemble/generate"
    post(url, {"text_input": "x", **ASKED}, traceparent=unsampled[0])
    for (header, _, _), changes in (refused, {"top_p": 7.0}), (timed_out, {"timeout_ms": 2000, "max_tokens": 8000}):
        with pytest.raises(urllib.error.HTTPError):
            post(url, {"text_input": "x", **ASKED, **changes}, traceparent=header)
    post(url, {"text_input": "x", **ASKED}, traceparent="no traceparent")
    spans = collector.spans_of(refused[1])
    assert spans["llm_request"].status.message == "INVALID_ARG"
    spans = collector.spans_of(timed_out[1])
    assert (spans["llm_request"].status.code, spans["llm_request"].status.message) == (2, "CANCELLED")
    assert list(spans) == [*PHASES, "llm_request"], "it ended in the midst of its decode"
    wait_until(lambda: any(not span.parent_span_id for each in collector.traces.values() for span in each), 10.0)
    assert unsampled[1] not in collector.traces


@pytest.mark.server
def test_phases_add_up_to_what_the_client_saw(server: TritonServer) -> None:
    """Within two percent: the best of some tries, since client and server share two cores with whatever else runs."""
    missing = []
    client = StreamClient(server.grpc_url)
    for attempt in range(5):
        sent_ns = time.time_ns()
        asked = {**ASKED, "max_tokens": 2000, "stream": True, "return_perf_metrics": True}
        client.send("ensemble", str(attempt), text_input="The capital", **asked)
        answer = client.wait()[str(attempt)]
        seen_ns = time.time_ns() - sent_ns
        times = {name: array.item() for name, array in answer.responses[-1].items() if name.endswith("_time_ns")}
        points = ("arrival", "first_scheduled", "first_token", "decode_submitted", "decode_joined", "last_token")
        spans = [times[f"{end}_time_ns"] - times[f"{start}_time_ns"] for start, end in pairwise(points)]
        assert all(span > 0 for span in spans)
        missing.append(1 - sum(spans) / seen_ns)
        if missing[-1] < 0.02:
            break
    client.close()
    assert 0 <= min(missing) < 0.02


def recorded(number: int) -> Ended:
    return Ended(Timeline(arrival_ns=number), 1, 1, "stop", is_error=False)


def test_a_collector_that_takes_nothing_holds_nobody_up(own_collector: Collector) -> None:
    """What does not fit into the queue has no spans, and is counted; the rest leaves when the collector goes on."""
    dropped: list[int] = []
    own_collector.goes_on.clear()
    traces = Traces(own_collector.url, "model", dropped.append)
    num_requests = MAX_QUEUED + 3 * MAX_BATCH
    for number in range(num_requests):
        traces.record(recorded(number + 1))
    assert MAX_BATCH <= sum(dropped) <= 3 * MAX_BATCH
    own_collector.goes_on.set()
    num_left = num_requests - sum(dropped)
    wait_until(lambda: sum(map(len, own_collector.traces.values())) == 2 * num_left, 30.0)
    traces.record(recorded(1))
    traces.close()
    assert sum(map(len, own_collector.traces.values())) == 2 * (num_left + 1), "close hands over what is there"


def test_a_collector_that_refuses(own_collector: Collector) -> None:
    dropped: list[int] = []
    traces = Traces(f"{own_collector.url}/no/such", "model", dropped.append)
    traces.record(recorded(1))
    wait_until(lambda: dropped == [1], 20.0)
    traces.close()


def test_endpoints() -> None:
    assert spans_url("http://host:4318") == spans_url("http://host:4318/") == "http://host:4318/v1/traces"
    assert spans_url("https://host/tenant/traces") == "https://host/tenant/traces"
    for wrong in ("host:4318", "grpc://host:4317", ""):
        with pytest.raises(ConfigError, match="otlp_endpoint"):
            Deployment.parse({"model": {"path": "x"}, "decode": {"devices": ["cpu"]}, "otlp_endpoint": wrong})


@pytest.mark.parametrize(
    ("timeline", "expected"),
    [
        (Timeline(1), "queue 1-9"),
        (Timeline(1, 2), "queue 1-2, prefill 2-9"),
        (Timeline(1, 2, 3, last_token_ns=3, prefill_replica=0), "queue 1-2, prefill 2-3"),
        (Timeline(1, 2, 3, prefill_replica=0), "queue 1-2, prefill 2-3, bridge 3-9"),
        (Timeline(1, 2, 3, 4, prefill_replica=0), "queue 1-2, prefill 2-3, bridge 3-4, transfer 4-9"),
        (Timeline(1, 2, 3, 5, 4), "queue 1-2, prefill 2-3, bridge 3-5, transfer 5-9"),  # 4: of the attempt before
        (Timeline(1, 2, 3, last_token_ns=6, decode_replica=1), "queue 1-2, prefill 2-3, decode 3-6"),
        (Timeline(1, 2, 3, decode_replica=1), "queue 1-2, prefill 2-3, decode 3-9"),
    ],
)
def test_phases_of_requests_that_end_early_or_stay(timeline: Timeline, expected: str) -> None:
    assert ", ".join(f"{name} {start}-{end}" for name, start, end in phases(timeline, 9)) == expected


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    code = "import sys, ensemble.serving.front_door; print([n for n in sys.modules if 'opentelemetry' in n])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
