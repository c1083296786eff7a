"""The page of metrics: the Triton server's own and ours, or neither."""

import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ensemble.errors import ConfigError
from ensemble.serving.metric_families import ITL
from ensemble.serving.metrics import Metrics
from ensemble.serving.metrics_page import MAX_CONNECTIONS, METRICS_VARIABLE, MetricsPage


class _TritonServersPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# TYPE nv_inference_count counter\nnv_inference_count 3\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _TritonServersPage)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return str(response.read().decode())


def test_the_servers_page_comes_first_and_none_without_it(upstream: HTTPServer) -> None:
    page = MetricsPage("127.0.0.1", 0, upstream.server_port, lambda: "ours 1\n")
    try:
        assert get(page.port).splitlines()[1:] == ["nv_inference_count 3", "ours 1"]
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
        for _ in range(2):  # kept alive
            connection.request("GET", "/metrics?name=x")
            assert connection.getresponse().read().endswith(b"ours 1\n")
        connection.close()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(page.port, "/")
        upstream.socket.close()
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            get(page.port)
        assert "the Triton server's metrics are not there" in refused.value.read().decode()
    finally:
        page.close()


def test_ours_alone_for_a_server_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(METRICS_VARIABLE, raising=False)
    assert MetricsPage.from_environment(lambda: "") is None
    monkeypatch.setenv(METRICS_VARIABLE, "127.0.0.1 0 0")
    page = MetricsPage.from_environment(lambda: "ours 1\n")
    assert page is not None and get(page.port) == "ours 1\n"
    monkeypatch.setenv(METRICS_VARIABLE, f"127.0.0.1 {page.port} 0")
    with pytest.raises(ConfigError, match="in use"):
        MetricsPage.from_environment(lambda: "")
    page.close()
    monkeypatch.setenv(METRICS_VARIABLE, "8002")
    with pytest.raises(ConfigError, match="DISTSERVE_METRICS = '8002': HOST PORT UPSTREAM_PORT"):
        MetricsPage.from_environment(lambda: "")


def test_a_crowd_costs_no_more_threads_than_there_are_places() -> None:
    page = MetricsPage("127.0.0.1", 0, 0, lambda: "ours 1\n")
    num_threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        stack.callback(page.close)
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=5))
            for _ in range(MAX_CONNECTIONS + 8)
        ]
        for each in crowd[MAX_CONNECTIONS:]:
            assert each.recv(1) == b""
        assert threading.active_count() <= num_threads + MAX_CONNECTIONS
        for each in crowd[:MAX_CONNECTIONS]:
            each.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"".join(iter(lambda each=each: each.recv(4096), b"")).endswith(b"ours 1\n")  # type: ignore[misc]
        assert get(page.port) == "ours 1\n", "a place is free again"


def test_who_gets_no_thread_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    page, start, num_left = MetricsPage("127.0.0.1", 0, 0, lambda: "ours 1\n"), Thread.start, MAX_CONNECTIONS

    def exhausted(thread: Thread) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left >= 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    try:
        monkeypatch.setattr(Thread, "start", exhausted)
        for _ in range(MAX_CONNECTIONS):
            with pytest.raises(OSError):
                get(page.port)
        assert get(page.port) == "ours 1\n"
    finally:
        page.close()


def test_values_as_prometheus_reads_them() -> None:
    metrics = Metrics('a "name"\\with\nall')
    metrics.observe(ITL, [0.001, 0.0011, 1000.0])
    replica = (("stage", "decode"), ("replica", "7"))
    metrics.text({("distserve:kv_blocks", replica): 5})
    told_nothing = metrics.text({})  # the router was too busy
    families = {family.name: family for family in text_string_to_metric_families(told_nothing)}
    (blocks,) = families["distserve:kv_blocks"].samples
    assert blocks.labels == {"stage": "decode", "replica": "7", "model_name": 'a "name"\\with\nall'}
    assert blocks.value == 5
    samples = families[ITL].samples
    buckets = {each.labels["le"]: each.value for each in samples if each.name.endswith("_bucket")}
    assert [buckets[bound] for bound in ("0.001", "0.0025", "80.0", "+Inf")] == [1, 2, 2, 3]
    sums = {each.name.removeprefix(ITL): each.value for each in samples if not each.name.endswith("_bucket")}
    assert sums == pytest.approx({"_sum": 1000.0021, "_count": 3})
    metrics.text({("distserve:num_requests_bridge", ()): 0})
    left = {family.name: family for family in text_string_to_metric_families(metrics.text({}))}
    assert not left["distserve:kv_blocks"].samples, "of a replica that is gone"
