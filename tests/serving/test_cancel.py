"""A client that goes away frees everything it held, in both stages, through every front."""

import json
import socket
import time
from collections.abc import Callable

import pytest

from tests.serving.clients import StreamClient, blocks_in_use, generate, read_metrics
from tools.triton_server import TritonServer

pytestmark = pytest.mark.server

LONG = {"text_input": "The capital", "max_tokens": 500, "temperature": 0.0, "ignore_eos": True, "stream": True}


def grpc_cancel(server: TritonServer, model: str) -> None:
    """Cancels after the first responses, in the midst of decode."""
    client = StreamClient(server.grpc_url)
    client.send(model, "0", **LONG)
    wait_until(lambda: len(client.answers["0"].responses) >= 2, 10)
    client.close(cancel=True)


def http_disconnect(server: TritonServer, model: str) -> None:
    """Closes the connection after the first event of a generate_stream answer."""
    assert server.ports is not None
    body = json.dumps(LONG)
    with socket.create_connection(("127.0.0.1", server.ports.http)) as connection:
        request = (
            f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        connection.sendall(request.encode())
        received = b""
        while b"text_output" not in received:
            received += connection.recv(4096)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def sample(server: TritonServer, name: str) -> float:
    return sum(value for key, value in read_metrics(server.metrics_url).items() if key.startswith(name))


@pytest.mark.parametrize("leave", [grpc_cancel, http_disconnect])
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
def test_blocks_are_free_and_the_cancel_is_counted(
    tiny_server: TritonServer, model: str, leave: Callable[[TritonServer, str], None]
) -> None:
    generate(tiny_server.grpc_url, text_input="x", max_tokens=2)
    cancelled = 'distserve:request_errors_total{code="CANCELLED"'
    before = sample(tiny_server, cancelled)
    leave(tiny_server, model)
    # 500 ms for the cancel, and the metrics' own interval of 250 ms
    wait_until(lambda: sample(tiny_server, cancelled) == before + 1, 2.0)
    wait_until(lambda: blocks_in_use(read_metrics(tiny_server.metrics_url)) == 0, 1.0)
    assert sample(tiny_server, "vllm:num_requests_running") == 0
