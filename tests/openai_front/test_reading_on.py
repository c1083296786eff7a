"""Answers that do not wait for the request's body, as clients get them that send all of it first."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Message

from ensemble.openai_front import bounded_http, reading_on
from ensemble.openai_front.access import guard
from ensemble.openai_front.app import read_body
from ensemble.openai_front.bounded_http import BoundedHttp
from ensemble.openai_front.errors import ApiError, answer_api_error
from ensemble.openai_front.reading_on import ReadsOn

LIMIT = 1 << 20  # bytes of a body that is taken
READ_ON = 64 << 20
MEBIBYTE = b" " * (1 << 20)
KEY = {"Authorization": "Bearer key"}
HEAD = "POST /v1/take HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"


async def take(request: Request) -> Response:
    return JSONResponse(len(await read_body(request, LIMIT)))


async def take_and_think(request: Request) -> Response:
    response = await take(request)
    await asyncio.sleep(0.3)  # longer than the tests let a head take
    return response


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = FastAPI()
    app.add_api_route("/v1/take", take, methods=["POST"])
    app.add_api_route("/v1/think", take_and_think, methods=["POST"])
    app.add_exception_handler(ApiError, answer_api_error)
    guard(app, "key", ())
    config = uvicorn.Config(ReadsOn(app, READ_ON), http=BoundedHttp, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(connection: http.client.HTTPConnection, path: str, headers: dict[str, str], mebibytes: int) -> int:
    in_chunks = "Content-Length" not in headers
    connection.request("POST", path, (MEBIBYTE for _ in range(mebibytes)), headers, encode_chunked=in_chunks)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.parametrize("mebibytes", [2, 5, 48])
@pytest.mark.parametrize("framing", ["sized", "chunked"])
@pytest.mark.parametrize("keeps", ["close", "keep-alive"])
@pytest.mark.parametrize(
    ("path", "headers", "status"), [("/v1/take", KEY, 413), ("/v1/take", {}, 401), ("/v1/other", KEY, 404)]
)
def test_the_answer_comes(
    port: int, path: str, headers: dict[str, str], status: int, keeps: str, framing: str, mebibytes: int
) -> None:
    framed = {"Content-Length": str(mebibytes << 20)} if framing == "sized" else {"Transfer-Encoding": "chunked"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    assert ask(connection, path, {"Connection": keeps, **framed, **headers}, mebibytes) == status
    connection.close()


def test_what_is_read_to_its_end_keeps_its_connection(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.connect()
    sock = connection.sock
    for framing in ({"Content-Length": str(LIMIT)}, {"Transfer-Encoding": "chunked"}):
        assert ask(connection, "/v1/take", {**KEY, **framing}, 1) == 200
    assert connection.sock is sock
    connection.close()


def test_the_answer_does_not_wait_for_the_body(port: int) -> None:
    """Nor does a client that asks first get told to send it."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /v1/take HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        answer = client.recv(1 << 16)
        client.sendall(b"123456789")
        answer += b"".join(iter(lambda: client.recv(1 << 16), b""))  # closed, in order
    assert answer.startswith(b"HTTP/1.1 401 ") and answer.count(b"HTTP/1.1") == 1


def test_a_body_without_an_end_is_read_so_far_and_no_further(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client, pytest.raises(ConnectionError):
        client.sendall(f"{HEAD}Content-Length: {1 << 40}\r\n\r\n".encode())
        for _ in range(1024):
            client.sendall(MEBIBYTE)


@pytest.mark.parametrize(
    "head", [b"X: " + b"a" * (8 << 20), b"X: a\r\n" * (1 << 20), b" " * (8 << 20)], ids=["long", "many", "spaces"]
)
def test_a_head_without_an_end(port: int, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /v1/take HTTP/1.1\r\nHost: x\r\n" + head)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    _, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_what_is_no_request_is_answered_and_ends_the_one_before(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n".encode())
        client.sendall(b"no chunk\r\n" + MEBIBYTE)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1


def test_a_client_that_says_no_more_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_on, "LINGER_S", 0.01)
    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve() -> None:
        scope = {"type": "http", "headers": [(b"content-length", b"9")]}
        silence = asyncio.Event()
        await ReadsOn(Response("no", 401), READ_ON)(scope, silence.wait, send)  # type: ignore[arg-type]

    asyncio.run(serve())
    assert (b"connection", b"close") in sent[0]["headers"]
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]


@pytest.mark.parametrize("begun", [b"", b"POST /v1/take HT", b"GET /v1/other HTTP/1.1\r\n\r\nGET /v1"])
def test_a_head_that_does_not_come_is_not_waited_for(port: int, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(begun)
        answer = b"".join(iter(lambda: client.recv(4096), b""))  # closed, in order
    assert answer.count(b"HTTP/1.1 ") == begun.count(b"\r\n\r\n")


def test_a_body_that_takes_longer_than_a_head_may_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"{HEAD}Content-Length: 2\r\n\r\n1".encode())
        time.sleep(0.3)
        client.sendall(b"2")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_an_empty_line_after_a_body_is_no_head_that_is_awaited(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(f"{HEAD.replace('take', 'think')}Content-Length: 1\r\n\r\n1".encode())
        time.sleep(0.05)  # else both may come as one piece
        client.sendall(b"\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_goes_in_the_midst_of_a_body_is_no_fault(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"{HEAD}Content-Length: 9\r\n\r\n1".encode())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(2):  # the loop has seen the first client's end when it answers the second time
        assert ask(connection, "/v1/take", {**KEY, "Content-Length": "0"}, 0) == 200
    assert not caplog.records
