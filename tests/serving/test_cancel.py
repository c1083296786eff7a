"""A client that goes away frees everything it held, in both stages, through every front and in every state."""

import contextlib
import json
import queue
import socket
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.checkpoints import make_tiny_llama
from tests.serving.clients import StreamClient, blocks_in_use, generate, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_faults import worker
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

LONG: dict[str, Any] = {
    "text_input": "The capital",
    "max_tokens": 4000,
    "temperature": 0.0,
    "ignore_eos": True,
    "stream": True,
}


def grpc_cancel(server: TritonServer, model: str) -> None:
    """Cancels after the first responses, in the midst of decode."""
    client = StreamClient(server.grpc_url)
    client.send(model, "0", **LONG)
    wait_until(lambda: len(client.answers["0"].responses) >= 2, 10)
    client.close(cancel=True)


def http_disconnect(server: TritonServer, model: str) -> None:
    """Closes the connection after the first event of a generate_stream answer."""
    with open_post(server, model, "generate_stream", LONG) as connection:
        read_first_event(connection)


def open_post(server: TritonServer, model: str, endpoint: str, asked: dict[str, Any]) -> socket.socket:
    assert server.ports is not None
    connection = socket.create_connection(("127.0.0.1", server.ports.http))
    body = json.dumps(asked)
    head = f"POST /v2/models/{model}/{endpoint} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def read_first_event(connection: socket.socket) -> None:
    received = b""
    while b"text_output" not in received:
        data = connection.recv(4096)
        assert data, f"closed after {received!r}"
        received += data


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def sample(server: TritonServer, name: str) -> float:
    return sum(value for key, value in read_metrics(server.metrics_url).items() if key.startswith(name))


FREED_S = 0.75  # pings are 0.3 s apart, or the front sees a connection's end
CANCELLED = 'distserve:request_errors_total{code="CANCELLED"'


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One prompt a batch, one sequence in decode, and answers of up to 4,000 tokens."""
    path = tmp_path_factory.mktemp("narrow")
    model = make_tiny_llama(path / "model", max_position_embeddings=4096)
    deployment = deploy(model, prefill={"max_num_seqs": 1}, decode={"max_num_seqs": 1})
    with TritonServer(deployment, log_path=path / "log") as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, "ensemble", text_input="x", max_tokens=2)
        yield server


@pytest.mark.parametrize("leave", [grpc_cancel, http_disconnect])
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
def test_blocks_are_free_and_the_cancel_is_counted(
    narrow_server: TritonServer, model: str, leave: Callable[[TritonServer, str], None]
) -> None:
    generate(narrow_server.grpc_url, text_input="x", max_tokens=2)
    before = sample(narrow_server, CANCELLED)
    leave(narrow_server, model)
    wait_until(lambda: sample(narrow_server, CANCELLED) == before + 1, 10)
    wait_until(lambda: blocks_in_use(read_metrics(narrow_server.metrics_url)) == 0, 10)
    assert sample(narrow_server, "vllm:num_requests_running") == 0


# ---- in every state, held there by stopping a worker's process


@contextlib.contextmanager
def stopped(server: TritonServer, stage: str | None) -> Iterator[None]:
    process = worker(server, stage) if stage is not None else None
    if process is not None:
        process.suspend()
    try:
        yield
    finally:
        if process is not None:
            process.resume()


class State(NamedTuple):
    stopped_stage: str | None
    num_others: int  # requests that were there before
    gauge: str  # 1 when the request is there


STATES = {
    "queued": State("prefill", 2, "vllm:num_requests_waiting"),
    "in prefill": State("prefill", 0, "vllm:num_requests_running"),
    "in the bridge": State("decode", 1, "distserve:num_requests_bridge"),
    "in transfer": State("decode", 0, "vllm:num_requests_running"),
    "in decode": State(None, 0, "vllm:num_requests_running"),
}


@contextlib.contextmanager
def in_state(server: TritonServer, name: str, send: Callable[[], None]) -> Iterator[None]:
    """Sends a request, and holds it in a state; afterwards every other request is cancelled."""
    state = STATES[name]
    others = [StreamClient(server.grpc_url) for _ in range(state.num_others)]
    with stopped(server, state.stopped_stage):
        for other in others:
            other.send("scheduler", "0", **LONG)
        wait_until(lambda: sample(server, "vllm:num_requests_running") == state.num_others, 5.0)
        send()
        wait_until(lambda: sample(server, state.gauge) == 1, 5.0)
        if state.stopped_stage != "prefill":  # one that came later has left prefill
            generate(server.grpc_url, text_input="x", max_tokens=1)
        yield
        for other in others:
            other.close(cancel=True)


freed_s: dict[tuple[str, str], list[float]] = defaultdict(list)  # state, front |-> seconds from a client's leaving


def leave_in(server: TritonServer, state: str, front: str, send: Callable[[], None], leave: Callable[[], None]) -> None:
    before = sample(server, CANCELLED)
    with in_state(server, state, send):
        left_at = time.monotonic()
        leave()
        wait_until(lambda: sample(server, CANCELLED) == before + 1, 10)
        freed_s[state, front].append(time.monotonic() - left_at)
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 10)
    wait_until(lambda: sample(server, "vllm:num_requests_running") == 0, 10)
    assert sample(server, "vllm:num_requests_waiting") == 0


@pytest.mark.parametrize(("model", "stream"), [("scheduler", False), ("ensemble", True)])
@pytest.mark.parametrize("name", STATES)
def test_grpc_cancel_in_every_state(narrow_server: TritonServer, name: str, model: str, stream: bool) -> None:
    client = StreamClient(narrow_server.grpc_url)
    asked = {**LONG, "stream": stream}
    leave_in(narrow_server, name, "gRPC", lambda: client.send(model, "0", **asked), lambda: client.close(cancel=True))


@pytest.mark.parametrize(("model", "endpoint"), [("scheduler", "generate_stream"), ("ensemble", "generate")])
@pytest.mark.parametrize("name", STATES)
def test_http_disconnect_in_every_state(narrow_server: TritonServer, name: str, model: str, endpoint: str) -> None:
    connections: list[socket.socket] = []
    asked = {**LONG, "stream": endpoint == "generate_stream"}
    leave_in(
        narrow_server,
        name,
        "HTTP",
        lambda: connections.append(open_post(narrow_server, model, endpoint, asked)),
        lambda: connections[0].close(),
    )


def test_who_left_was_known_at_once() -> None:
    """After the tests of every state; of two, since the machine may hold up one."""
    assert all(min(seconds) < FREED_S for seconds in freed_s.values()), freed_s


def test_a_closed_connection_whose_requests_are_answered_cancels_nothing(narrow_server: TritonServer) -> None:
    before = sample(narrow_server, CANCELLED)
    for _ in range(3):
        with open_post(narrow_server, "ensemble", "generate", {"text_input": "x", "max_tokens": 2}) as connection:
            read_first_event(connection)
    time.sleep(FREED_S)
    assert sample(narrow_server, CANCELLED) == before


# ---- what pings are to a client that stays: nothing


def post(url: str, body: dict[str, Any], answers: "queue.SimpleQueue[bytes]") -> None:
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30) as response:
        answers.put(response.read())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_waits_long_gets_its_text_alone(narrow_server: TritonServer, stream: bool) -> None:
    server = narrow_server
    asked = {"text_input": "The capital", "max_tokens": 6, "temperature": 0.0, "stream": stream}
    expected = generate(server.grpc_url, **asked).text
    url = f"{server.http_url}/v2/models/ensemble/{'generate_stream' if stream else 'generate'}"
    http: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client = StreamClient(server.grpc_url)
    executed = 'nv_inference_request_success{model="answer"'
    with stopped(server, "decode"):
        thread = threading.Thread(target=post, args=(url, asked, http))
        thread.start()
        for model in ("ensemble", "scheduler"):
            client.send(model, model, **asked)
        wait_until(lambda: sample(server, "vllm:num_requests_running") == 3, 5.0)
        before = sample(server, executed)
        wait_until(lambda: sample(server, executed) >= before + 8, 30)
    for answer in client.wait().values():
        assert answer.error is None
        assert answer.ends_with_outputs
        assert answer.text == expected
        assert stream or len(answer.responses) == 1
    client.close()
    thread.join(timeout=30)
    events = [json.loads(part.removeprefix(b"data: ")) for part in http.get().strip().split(b"\n\n")]
    assert "".join(event["text_output"] for event in events) == expected
    assert all(event["text_output"] for event in events)
    assert stream or len(events) == 1


def test_a_first_token_waits_for_its_sequence_to_join_decode(narrow_server: TritonServer) -> None:
    server = narrow_server
    asked = {"text_input": "The capital", "max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "stream": True}
    expected = generate(server.grpc_url, **asked).text
    client = StreamClient(server.grpc_url)
    with stopped(server, "decode"):
        client.send("scheduler", "0", **asked)
        wait_until(lambda: sample(server, "vllm:num_requests_running") == 1, 5.0)
        # Its prompt is computed behind that one's, and it ends there: by then the first token of the other is known.
        generate(server.grpc_url, text_input="The capital", max_tokens=1)
        assert client.answers["0"].responses == []
    answer = client.wait()["0"]
    client.close()
    assert answer.error is None and answer.text == expected
