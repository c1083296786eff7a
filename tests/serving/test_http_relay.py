"""The HTTP relay: what it does to requests, against an HTTP server that tells what reached it."""

import asyncio
import contextlib
import gzip
import http.client
import itertools
import json
import select
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient

from ensemble.errors import (
    DeadlineExceeded,
    DistServeError,
    InternalError,
    InvalidRequest,
    Overloaded,
    StageUnavailable,
)
from ensemble.serving import http_downstream
from ensemble.serving.heartbeat import beats_folder
from ensemble.serving.http_contract import MAX_KEPT_BYTES, AnswerInspector, as_plain_request
from ensemble.serving.http_messages import with_first_member
from ensemble.serving.http_relay import MAX_LARGE_BODIES, HttpRelay, Limits
from ensemble.serving.marks import CLIENT_TAG
from ensemble.serving.run_dir import cancel_address
from tools.server.ports import Ports
from tools.server.processes import spawn

DEADLINE = "deadline exceeded: the request's timeout_ms has passed"
GENERATE = "/v2/models/ensemble/generate"
MAX_BODY_BYTES = 10 << 20
JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
WHITE = st.text(" \t\r\n", max_size=5).map(str.encode)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({position % (len(data) + 1) for position in at}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start < end]


@given(JSON_VALUES, WHITE, WHITE)
def test_a_member_is_added_to_objects_alone(value: Any, before: bytes, inside: bytes) -> None:
    text = json.dumps(value).encode()
    if isinstance(value, dict):
        text = b"{" + inside + text[1:]
    body = before + text
    result = with_first_member(body, b'"the tag": "x"')
    assert json.loads(result) == ({"the tag": "x", **value} if isinstance(value, dict) and value else value)


class Echo(BaseHTTPRequestHandler):
    """Answers with the body it got; to ...?wait after `go_on`."""

    protocol_version = "HTTP/1.1"
    go_on: ClassVar[threading.Event]

    def do_POST(self) -> None:
        body = (
            self.read_chunks()
            if self.headers["Transfer-Encoding"]
            else self.rfile.read(int(self.headers["Content-Length"]))
        )
        if self.path.endswith("?wait"):
            self.go_on.wait(timeout=10)
        self.answer(body)

    def do_GET(self) -> None:
        self.answer(self.path.encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has gone
            self.wfile.write(body)

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: Any) -> None:
        pass


class Relay:
    def __init__(self, port: int, run_dir: Path, cancels: "zmq.Socket[bytes]") -> None:
        self.port = port
        self.run_dir = run_dir
        self.cancels = cancels

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.fixture(scope="module")
def echo() -> Iterator[ThreadingHTTPServer]:
    Echo.go_on = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    Echo.go_on.set()
    server.shutdown()


@pytest.fixture(scope="module")
def relay(echo: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with running_relay(echo.server_port, tmp_path_factory.mktemp("relay")) as found:
        yield found


@contextlib.contextmanager
def running_relay(upstream_port: int, path: Path) -> Iterator[Relay]:
    address, port = cancel_address(path), Ports.free().http
    arguments = ["127.0.0.1", str(port), str(upstream_port), str(path), str(MAX_BODY_BYTES)]
    command = [sys.executable, "-m", "ensemble.serving.http_relay", *arguments]
    with zmq.Context() as context, context.socket(zmq.PULL) as cancels, (path / "log").open("wb") as log:
        cancels.bind(address)
        cancels.setsockopt(zmq.LINGER, 0)
        process = spawn(command, log, {})
        try:
            relay = Relay(port, path, cancels)
            for _ in range(500):
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                threading.Event().wait(0.02)
            yield relay
        finally:
            process.kill()
            process.wait()
        assert not (path / "log").read_bytes(), "no exception went by"


def test_generate_gets_a_tag_of_its_own_and_other_requests_pass_as_they_are(relay: Relay) -> None:
    connection = relay.connect()
    tags = set()
    for path in (GENERATE, f"{GENERATE}_stream", "/v2/models/ensemble/versions/1/generate"):
        connection.request("POST", path, json.dumps({"text_input": "é", "max_tokens": 2}))
        got = json.load(connection.getresponse())
        tags.add(got.pop(CLIENT_TAG))
        assert got == {"text_input": "é", "max_tokens": 2}
    assert len(tags) == 3
    connection.request("POST", "/v2/models/scheduler/infer", b'{"a": 1}')
    assert connection.getresponse().read() == b'{"a": 1}'
    connection.request("GET", "/v2/models/ensemble/config")
    assert connection.getresponse().read() == b"/v2/models/ensemble/config"
    packed = gzip.compress(b'{"a": 1}')
    connection.request("POST", "/v2/models/scheduler/infer", packed, {"Content-Encoding": "gzip"})
    assert connection.getresponse().read() == packed
    connection.close()


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("Deflate", zlib.compress), ("deflate", bare_deflate), ("x-gzip", gzip.compress)],
)
@pytest.mark.parametrize("size", [8, 3_000_000])
def test_compressed_bodies_of_generates_are_decoded(relay: Relay, encoding: str, compress: Any, size: int) -> None:
    body = {"text_input": "x" * size, "max_tokens": 2}
    connection = relay.connect()
    for is_chunked in (False, True):
        packed = compress(json.dumps(body).encode())
        data = iter([packed[:7], packed[7:]]) if is_chunked else packed
        connection.request("POST", GENERATE, data, {"Content-Encoding": encoding}, encode_chunked=is_chunked)
        got = json.load(connection.getresponse())
        assert got.pop(CLIENT_TAG)
        assert got == body
    connection.close()


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("br", b"x", 415, "Content-Encoding 'br' is not taken: gzip, deflate or none"),
        ("gzip", b"no such thing", 400, "the body is not gzip"),
        ("gzip", gzip.compress(b"{}" * 500)[:-4], 400, "it ends in its midst"),
        ("deflate", zlib.compress(b" " * MAX_BODY_BYTES + b"{}"), 413, f"longer than {MAX_BODY_BYTES} bytes"),
    ],
    ids=["unknown", "junk", "cut", "too long"],
)
def test_what_cannot_be_decoded_is_refused(relay: Relay, encoding: str, body: bytes, status: int, message: str) -> None:
    connection = relay.connect()
    connection.request("POST", GENERATE, body, {"Content-Encoding": encoding})
    response = connection.getresponse()
    assert response.status == status
    assert message in json.load(response)["error"]


@pytest.mark.parametrize(
    ("start", "headers"),
    [
        (f"POST {GENERATE}", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
        (f"POST {GENERATE}", "upgrade: h2c\r\nconnection: keep-alive, upgrade\r\n"),
        (f"POST http://example.org:8000{GENERATE}", ""),
        (f"POST HTTP://[::1]:8000{GENERATE}", ""),
        (f"POST {GENERATE.replace('s', '%73').replace('l', '%6C')}?a=%73", ""),
    ],
)
def test_other_ways_to_write_a_request(relay: Relay, start: str, headers: str) -> None:
    """Java's client offers an upgrade to HTTP/2, proxies send whole URLs; both are answered, and may send more."""
    request = f'{start} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 8\r\n\r\n{{"a": 1}}'.encode()
    answers = relay.raw(request * 2 + b"GET /v2/models/ensemble/config HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(CLIENT_TAG.encode()) == 2
    head = as_plain_request(request)
    assert head.partition(b" HTTP")[0].partition(b"?")[0] == f"POST {GENERATE}".encode()
    assert b"pgrade" not in head
    assert b"HTTP2" not in head
    assert (b"connection: keep-alive" in head.lower()) == ("keep-alive" in headers)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"max_tokens": 4294967301}', "max_tokens = 4294967301 is not valid: an integer of 32 bits"),
        (b'{"parameters": {"top_k": -99999999999}}', "top_k = -99999999999"),
        (b'{"temperature": 1e400}', "temperature = Infinity"),
        (b'{"seed": 18446744073709551616}', "seed = 18446744073709551616 is not valid: an integer of 64 bits"),
        (b'{"stop_token_ids": [1, 4294967297]}', "stop_token_ids = 4294967297"),
    ],
)
def test_numbers_of_which_the_server_would_take_a_part_are_refused(relay: Relay, body: bytes, message: str) -> None:
    connection = relay.connect()
    for chunked in (False, True):
        connection.request("POST", GENERATE, iter([body]) if chunked else body, encode_chunked=chunked)
        response = connection.getresponse()
        assert response.status == 400
        assert message in json.load(response)["error"]


def test_long_numbers_that_fit_pass(relay: Relay) -> None:
    connection = relay.connect()
    body = {"seed": 2**64 - 1, "text_input": "call 0123456789", "max_tokens": 2147483647}
    connection.request("POST", GENERATE, json.dumps(body))
    got = json.load(connection.getresponse())
    assert got.pop(CLIENT_TAG)
    assert got == body


def answered(status: bytes, message: str, pieces: list[int], request: bytes | None = b"{}") -> tuple[bytes, bytes]:
    """Head and body of what a client gets when the server's answer comes in pieces, cut at these positions."""
    body = json.dumps({"error": message}).encode()
    framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    data = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%b" % (status, framed)
    answer = AnswerInspector(request, to_http_1_0=False)
    got = b"".join(answer.push(piece) for piece in cut(data, pieces))
    assert answer.is_done
    head, _, got_body = got.partition(b"\r\n\r\n")
    return head, got_body


@given(st.lists(st.integers(0, 300), max_size=6))
def test_errors_get_their_status_however_they_arrive(pieces: list[int]) -> None:
    cases: list[tuple[DistServeError, int, int | None]] = [
        (Overloaded("a queue is full", 2.4), 503, 3),
        (StageUnavailable("decode", "its worker ended"), 503, 1),
        (DeadlineExceeded(DEADLINE), 504, None),
        (InternalError("here"), 500, None),
        (InvalidRequest("overloaded", 1, "retry after 9 s"), 400, None),
    ]
    for error, status, retry_after in cases:
        for message in (str(error), f"in ensemble 'vllm_model', {error}"):
            head, body = answered(b"400 Bad Request", message, pieces)
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert (b"Retry-After: %d" % (retry_after or 0) in head) == (retry_after is not None)
            assert json.loads(body) == {"error": message}
            assert b"Content-Length: %d" % len(body) in head


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (b'{"text_input": "x", "max_tokens": "many"}', 'max_tokens = "many" is not valid: an integer'),
        (b'{"text_input": "x", "max_tokens": null}', "max_tokens = null is not valid: an integer"),
        (b'{"text_input": 5}', "text_input = 5 is not valid: a string"),
        (b'{"parameters": {"temperature": "hot"}}', 'temperature = "hot" is not valid: a number'),
        (b'{"sampling_parameters": {"n": 1}}', 'sampling_parameters = {"n": 1} is not valid: a string of JSON'),
        (b'{"parameters": 5}', "parameters is not valid: a JSON object"),
        (
            b'{"max_tokns": null}',
            "max_tokns = None is not valid: there is no input of this name; did you mean max_tokens?",
        ),
        (b'{"id": 5}', "id = 5 is not valid: a string"),
        (b"[1]", "the body is not a JSON object"),
        (b'{"text_input": ', "the body is not JSON: "),
        (b"", "the body is not JSON: "),
        (b'{"text_input": "\xff"}', "the body is not UTF-8: "),
    ],
)
def test_a_wrong_type_is_a_400_that_names_the_field(request_body: bytes, message: str) -> None:
    head, body = answered(b"500 Internal Server Error", "Unable to parse 'data': attempt to", [], request_body)
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert message in json.loads(body)["error"]


@given(st.binary(max_size=200), st.lists(st.integers(0, 300), max_size=6))
def test_answers_without_an_error_pass_as_they_are(body: bytes, pieces: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    answer = AnswerInspector(None, to_http_1_0=False)
    assert b"".join(piece if answer.is_done else answer.push(piece) for piece in cut(data, pieces)) == data
    assert answer.is_done


def test_bodies_of_any_size_and_in_chunks(relay: Relay) -> None:
    connection = relay.connect()
    big = {"text_input": "x" * 9_000_000}
    connection.request("POST", GENERATE, json.dumps(big))
    assert json.load(connection.getresponse())["text_input"] == big["text_input"]
    connection.request("POST", GENERATE, iter([b" {", b'"a"', b": 1", b"}"]), encode_chunked=True)
    got = json.load(connection.getresponse())
    assert got.pop(CLIENT_TAG)
    assert got == {"a": 1}
    connection.request("POST", GENERATE, b"")
    assert connection.getresponse().read() == b""
    connection.close()


def test_messages_and_objects_reach_the_triton_server_as_strings(relay: Relay) -> None:
    """Its generate endpoint takes no JSON objects; what a text says of them is left alone."""
    connection = relay.connect()
    messages = [{"role": "user", "content": 'Größe, "messages": [{'}]
    connection.request("POST", GENERATE, json.dumps({"messages": messages, "parameters": {"logit_bias": {"5": 1}}}))
    got = json.load(connection.getresponse())
    assert json.loads(got["messages"]) == messages
    assert json.loads(got["parameters"]["logit_bias"]) == {"5": 1}
    for untouched in (
        {"messages": json.dumps(messages)},
        {"sampling_parameters": ["{}"]},
        {"text_input": '"messages": [1]'},
    ):
        connection.request("POST", GENERATE, json.dumps(untouched))
        got = json.load(connection.getresponse())
        del got[CLIENT_TAG]
        assert got == untouched
    connection.close()


def test_a_list_of_one_list_is_that_list(relay: Relay) -> None:
    connection = relay.connect()
    nested = {"input_ids": [[5, 6]], "parameters": {"stop": [["a", "[["]]}, "text_input": '"stop": [[1]]'}
    connection.request("POST", GENERATE, json.dumps(nested))
    got = json.load(connection.getresponse())
    del got[CLIENT_TAG]
    assert got == {"input_ids": [5, 6], "parameters": {"stop": ["a", "[["]}, "text_input": '"stop": [[1]]'}
    connection.request("POST", GENERATE, b'{"input_ids": [[1], [2]], "seed": 12345678901}')
    answer = connection.getresponse()
    assert answer.status == 400
    assert "input_ids = [[1], [2]] is not valid: a list of integers" in json.load(answer)["error"]


LARGE = [{"role": "user", "content": 'Größe 🙂 "messages": [{ ' * 60_000}]  # 2 MiB


@pytest.mark.parametrize("way", ["sized", "chunked", "gzip", "expect"])
def test_a_body_of_several_mib_is_looked_into_as_a_small_one_is(relay: Relay, way: str) -> None:
    """Its objects are packed, its faults are named, its numbers do not lose half of their bits."""

    def ask(body: dict[str, Any]) -> tuple[int, Any]:
        data, headers = json.dumps(body, ensure_ascii=False).encode(), {}
        if way == "gzip":
            data, headers = gzip.compress(data), {"Content-Encoding": "gzip"}
        if way == "expect":
            headers = {"Expect": "100-continue"}
        connection = relay.connect()
        chunks = (data[start : start + 99_999] for start in range(0, len(data), 99_999))
        connection.request(
            "POST", GENERATE, chunks if way == "chunked" else data, headers, encode_chunked=way == "chunked"
        )
        response = connection.getresponse()
        status, answer = response.status, json.load(response)
        connection.close()
        return status, answer

    status, got = ask({"messages": LARGE, "parameters": {"logit_bias": {"5": 1}, "top_p": 0.5}})
    assert (status, json.loads(got.pop("messages"))) == (200, LARGE)
    assert got.pop(CLIENT_TAG)
    assert json.loads(got["parameters"].pop("logit_bias")) == {"5": 1} and got == {"parameters": {"top_p": 0.5}}
    ids = list(range(300_000))
    status, got = ask({"input_ids": ids, "stop_token_ids": [1]})
    assert (status, got["input_ids"], bool(got[CLIENT_TAG])) == (200, ids, True)
    for fault, message in (
        ({"max_tokens": "many"}, 'max_tokens = "many" is not valid: an integer'),
        ({"max_tokns": None}, "did you mean max_tokens?"),
        ({"max_tokens": 2**32 + 5}, "an integer of 32 bits"),
        ({"input_ids": [*ids, 2**40]}, "input_ids = 1099511627776 is not valid"),
        ({"input_ids": [*ids, "x"]}, "input_ids = [0, 1, 2"),
    ):
        status, got = ask({"text_input": "x" * 1_100_000} | fault)
        assert (status, message in got["error"]) == (400, True), got


def test_a_body_that_begins_with_a_mark_of_its_order_of_bytes(relay: Relay) -> None:
    connection = relay.connect()
    connection.request("POST", GENERATE, b'\xef\xbb\xbf{"a": 1}')
    assert json.load(connection.getresponse()).keys() == {CLIENT_TAG, "a"}


def test_large_bodies_are_read_so_many_at_a_time(relay: Relay) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nContent-Length: {2 << 20}\r\n\r\n{{".encode()
    with contextlib.ExitStack() as stack:
        begun = []
        for _ in range(MAX_LARGE_BODIES + 2):
            begun.append(stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=10)))
            begun[-1].sendall(head + b" " * MAX_KEPT_BYTES)
        refused = set()
        while len(refused) < 2:
            answered, _, _ = select.select([each for each in begun if each not in refused], [], [], 10)
            assert answered, "all were taken"
            refused.update(answered)
        for each in refused:
            answer = each.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        connection = relay.connect()
        connection.request("POST", GENERATE, b'{"a": 1}')
        assert connection.getresponse().status == 200, "small ones pass"
        taken = next(each for each in begun if each not in refused)
        taken.sendall(b" " * ((2 << 20) - MAX_KEPT_BYTES - 2) + b"}")
        assert taken.recv(4096).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_waits_to_be_told_to_continue(relay: Relay) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\nExpect: 100-continue\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"a": 1}')
        received = b""
        while not received.endswith(b"}"):
            data = connection.recv(4096)
            assert data, f"closed after {received!r}"
            received += data
    assert CLIENT_TAG.encode() in received


def test_a_client_that_was_told_to_continue_is_told_what_is_wrong_with_what_follows(relay: Relay) -> None:
    head = b"POST /v2/models/scheduler/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"zz\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_the_tag_of_a_client_that_goes_is_told(relay: Relay) -> None:
    while relay.cancels.poll(300):
        relay.cancels.recv()
    connection = relay.connect()
    connection.request("POST", GENERATE, b'{"a": 1}')
    first = json.load(connection.getresponse())[CLIENT_TAG]
    assert not relay.cancels.poll(200), "it is still there"
    assert connection.sock is not None
    connection.sock.sendall(b"POST /v2/models/scheduler/generate?wait HTTP/1.1\r\nContent-Length: 1\r\n\r\nx")
    connection.close()
    assert relay.cancels.poll(10_000)
    told = relay.cancels.recv().decode()
    assert told.rpartition("-")[0] == first.rpartition("-")[0]
    assert int(told.rpartition("-")[2]) == int(first.rpartition("-")[2]) + 1, "of its last request"


LIVE = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
WAITING = f"POST {GENERATE}?wait HTTP/1.1\r\nContent-Length: 8\r\n\r\n".encode() + b'{"a": 1}'


BEHIND = pytest.mark.parametrize(
    "behind",
    [b"junk\r\nx\r\n\r\n", b"x" * 200_000, b"\r\n\r\n", LIVE, WAITING * 9],
    ids=["junk", "more than is read", "lines", "get", "nine more"],
)


@BEHIND
def test_what_comes_behind_a_generate_does_not_hide_its_answer(relay: Relay, behind: bytes) -> None:
    Echo.go_on.clear()
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as connection:
        connection.sendall(WAITING + behind)
        assert not select.select([connection], [], [], 0.1)[0], "nothing answers in its place"
        Echo.go_on.set()
        answer = b""
        while b'"a": 1}' not in answer:
            data = connection.recv(4096)
            assert data, f"closed after {answer!r}"
            answer += data
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@BEHIND
def test_what_comes_behind_a_generate_does_not_hide_that_its_client_goes(relay: Relay, behind: bytes) -> None:
    """Of what waits nothing has begun: the first is cancelled, alone."""
    other = relay.connect()
    other.request("POST", GENERATE, b'{"a": 1}')
    number = int(json.load(other.getresponse())[CLIENT_TAG].rpartition("-")[2])
    while relay.cancels.poll(100):
        relay.cancels.recv()
    Echo.go_on.clear()
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as connection:
        connection.sendall(WAITING + behind)
        assert not relay.cancels.poll(100), "it is still there"
    assert relay.cancels.poll(10_000)
    assert int(relay.cancels.recv().decode().rpartition("-")[2]) == number + 1
    Echo.go_on.set()
    assert not relay.cancels.poll(100)
    other.close()


def test_requests_that_come_at_once_are_answered_in_turn(relay: Relay) -> None:
    """Ten, of all kinds: each whole, and in order."""
    Echo.go_on.set()
    head = f"POST {GENERATE}_stream HTTP/1.1\r\nContent-Length: 8\r\n\r\n".encode()
    data = b"".join(head + b'{"a": %d}' % number + LIVE for number in range(4))
    data += b"GET /v2/models/ensemble/config HTTP/1.1\r\n\r\n"
    data += b"GET /v2 HTTP/1.1\r\nConnection: close\r\n\r\n"
    answers = relay.raw(data).split(b"HTTP/1.1 200 OK\r\n")[1:]
    found = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    assert [json.loads(body)["a"] for body in found[:8:2]] == [0, 1, 2, 3]
    assert found[1:8:2] == [b""] * 4
    assert found[8:] == [b"/v2/models/ensemble/config", b"/v2"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n0\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n0\r\n\r\n\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
    ids=["sized", "chunked", "error"],
)
def test_the_next_request_waits_for_the_last_byte_of_an_answer(tmp_path: Path, answer: bytes) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running_relay(listener.getsockname()[1], tmp_path) as relay,
        socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client,
    ):
        client.sendall(WAITING + b"GET /v2 HTTP/1.1\r\n\r\n")
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            while b"}" not in server.recv(4096):
                pass
            for start in range(len(answer)):
                assert not select.select([server], [], [], 0.002)[0], answer[:start]
                server.sendall(answer[start : start + 1])
            assert server.recv(4096).startswith(b"GET /v2 ")


def test_an_empty_line_after_a_body_is_passed_over(relay: Relay) -> None:
    request = f"POST {GENERATE} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    answer = relay.raw(request + b"\r\n" + b"GET /v2/models/stats HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.endswith(b"/v2/models/stats")


@pytest.mark.parametrize("start", ["PRI * HTTP/2.0", f"POST {GENERATE} HTTP/3", "GET /v2/health/live HTTP/0.9"])
def test_other_versions_of_http_are_told(relay: Relay, start: str) -> None:
    answer = relay.raw(f"{start}\r\n\r\nSM\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 505 ")
    assert f"HTTP/{start.rpartition('/')[2]} is not served here".encode() in answer


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.lists(st.integers(0, 400), max_size=6))
def test_chunks_are_joined_for_clients_of_http_1_0_however_they_arrive(parts: list[bytes], at: list[int]) -> None:
    head = b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nX: 1\r\nConnection: keep-alive"
    framed = b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts)
    answer = AnswerInspector(None, to_http_1_0=True)
    got = b"".join(answer.push(piece) for piece in cut(head + b"\r\n\r\n" + framed + b"0\r\n\r\n", at))
    assert answer.is_done and answer.ends_by_closing
    assert got == b"HTTP/1.0 200 OK\r\nX: 1\r\nConnection: close\r\n\r\n" + b"".join(parts)
    sized = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\n0\r\n"
    error = b"HTTP/1.0 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n0\r\n\r\n0\r\n\r\n"
    for whole in (sized, error):
        answer = AnswerInspector(None, to_http_1_0=True)
        assert b"".join(answer.push(piece) for piece in cut(whole, at)) == sized
        assert answer.is_done and not answer.ends_by_closing


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nContent-Length: many\r\n\r\n",
            b"Content-Length 'many' is not a number",
        ),
        (b"GET /v2 HTTP/1.1\r\nwhat is this\r\n\r\n", b"'what is this' is not a header"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"is not HTTP/1.1"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", b"is not the first line of a request"),
        (b"GET /v2\r\n", b"is not the first line of a request"),
        (b"GET /v2 HTTP/1.1\n", rb"'GET /v2 HTTP/1.1\\n' does not end in CR LF"),
        (b"GET /v2 HTTP/1.1\r\nX: 1\nTransfer-Encoding: chunked\r\n\r\n", b"does not end in CR LF"),
        (b"GET /v2 HTTP/1.1\r\nX: 1\rTransfer-Encoding: chunked\r\n\r\n", b"has a CR before that"),
        (b"GET /v2 HTTP/1.1\r\nX(Y): 1\r\n\r\n", b"'X(Y): 1' is not a header"),
        (b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", b"longer than 65536 bytes"),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"chunk size 'zz' is not a number",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
            b"chunk size '-1' is not a number",
        ),
        (
            f"POST {GENERATE} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{}}\r\n".encode(),
            b"a chunk is longer than its size",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000,
            b"longer than 65536 bytes",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nContent-Length: 1\r\nContent-length: 2\r\n\r\n",
            b"Content-length is there twice",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"are both there",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nContent-Length : 1\r\n\r\n",
            b"'Content-Length : 1' is not a header",
        ),
        (
            b"POST /v2/models/scheduler/infer HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"neither chunked nor identity",
        ),
    ],
    ids=[
        "length",
        "header",
        "TLS",
        "SSH",
        "HTTP/0.9",
        "LF",
        "LF in a header",
        "CR in a header",
        "name",
        "long head",
        "chunk size",
        "signed",
        "long chunk",
        "long chunk size",
        "two lengths",
        "both",
        "space",
        "encoding",
    ],
)
def test_what_is_no_http_is_refused(relay: Relay, data: bytes, message: bytes) -> None:
    answer = relay.raw(data)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert message in answer


def test_while_the_triton_server_is_down(tmp_path: Path) -> None:
    with running_relay(Ports.free().http, tmp_path) as relay:
        connection = relay.connect()
        for path, message in (
            ("/v2/health/ready", "the Triton server does not answer"),
            ("/v2/models/stats", "the Triton server does not answer"),
        ):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert json.load(response) == {"error": message}
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200


# ---- what passes


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v2/models/prefill/generate", 403, "model prefill is not for clients"),
        ("POST", "/v2/models/decode/versions/1/infer", 403, "model decode is not for clients"),
        ("POST", "/v2/models/preprocess/generate_stream", 403, "use ensemble or scheduler"),
        ("POST", "/v2/models/pre%66ill/generate", 403, "model prefill is not for clients"),
        ("POST", "/v2/models/ensemble%2Fgenerate/generate", 403, "is not for clients"),
        ("POST", "/v2/models/%2565nsemble/generate", 403, "is not for clients"),
        ("GET", "/v2/models/ensemble/generate", 405, "send POST"),
        ("HEAD", "/v2/health/ready", 405, ""),
        ("OPTIONS", "/v2/models/ensemble/generate_stream", 405, "send POST"),
        ("POST", "/v2/repository/models/scheduler/unload", 404, "is not among what this server offers"),
        ("POST", "/v2/systemsharedmemory/region/mine/register", 403, "--allow-client-shm"),
        ("POST", "/v2/cudasharedmemory/region/mine/register", 403, "--allow-client-shm"),
        ("POST", "/v2/trace/setting", 404, "is not among what this server offers"),
        ("POST", "/v2/logging", 404, "is not among what this server offers"),
        ("GET", "/v2/../v2/models/x/generate", 404, "is not among what this server offers"),
    ],
)
def test_what_is_not_for_clients_does_not_pass(relay: Relay, method: str, path: str, status: int, message: str) -> None:
    connection = relay.connect()
    connection.request("POST", GENERATE, b'{"a": 1}')  # an answer before, on the same connection, changes nothing
    connection.getresponse().read()
    connection.request(method, path, b'{"a": 1}')
    response = connection.getresponse()
    assert response.status == status
    assert method == "HEAD" or message in json.load(response)["error"]
    connection.close()


@pytest.mark.parametrize(
    "path",
    ["/v2", "/v2/models/stats", "/v2/models/prefill", "/v2/models/decode/versions/1/config", "/v2/models/x/stats"],
)
def test_reading_about_models_passes(relay: Relay, path: str) -> None:
    connection = relay.connect()
    connection.request("GET", f"{path}?x=1")
    assert connection.getresponse().read() == f"{path}?x=1".encode()
    connection.close()


def test_readiness_is_what_the_scheduler_says_and_live_is_live(relay: Relay) -> None:
    beat = beats_folder(relay.run_dir) / "scheduler-1"
    beat.parent.mkdir()
    connection = relay.connect()
    try:
        for is_serving, status in ((True, 200), (False, 503), (True, 200)):
            beat.write_bytes(beat_of(pid=1, is_serving=is_serving))
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read() == b""
            connection.request("GET", "/v2/models/scheduler/ready")
            response = connection.getresponse()
            response.read()
            assert response.status == status
    finally:
        shutil.rmtree(beat.parent)
        connection.close()


def beat_of(pid: int, is_serving: bool) -> bytes:
    return struct.pack("<QQ?", pid, 1, is_serving).ljust(512, b"\0")


def test_a_body_that_is_too_long_is_refused_by_name(relay: Relay) -> None:
    allowed = f"the body is longer than {MAX_BODY_BYTES} bytes (--max-body-bytes)"
    connection = relay.connect()
    connection.request("POST", GENERATE, b'{"a": 1}')
    connection.getresponse().read()
    started = time.monotonic()
    connection.request("POST", GENERATE, b"x" * (MAX_BODY_BYTES + 1))
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"] == allowed
    connection.close()
    connection = relay.connect()
    with contextlib.suppress(ConnectionError):  # the answer may come before all chunks are sent
        connection.request("POST", GENERATE, (b" " * (1 << 20) for _ in range(12)), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"] == allowed
    connection.close()
    assert time.monotonic() - started < 5


def test_a_server_that_ends_before_it_answers_is_an_error_and_no_silence(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running_relay(listener.getsockname()[1], tmp_path) as relay,
    ):
        connection = relay.connect()
        connection.request("POST", GENERATE, b'{"a": 1}')
        accepted, _ = listener.accept()
        while b"}" not in accepted.recv(4096):
            pass
        accepted.close()
        response = connection.getresponse()
        assert response.status == 503
        assert json.load(response) == {"error": "the Triton server does not answer"}


@contextlib.asynccontextmanager
async def relay_here(upstream_port: int, run_dir: Path, max_connections: int = 1000) -> AsyncIterator[int]:
    """In this event loop. Its port."""
    port = Ports.free().http
    with zmq.Context() as context, context.socket(zmq.PUSH) as cancels:
        cancels.setsockopt(zmq.LINGER, 0)
        limits = Limits(MAX_BODY_BYTES, max_connections)
        serving = asyncio.create_task(HttpRelay(upstream_port, run_dir, limits, cancels).serve("127.0.0.1", port))
        while not port_answers(port):
            await asyncio.sleep(0.01)
        yield port
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def port_answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_crowd_that_comes_at_once_waits_in_the_backlog(tmp_path: Path) -> None:
    """Who found no room there would try again after a second, and later."""

    async def connect_while_it_is_busy() -> None:
        async with relay_here(0, tmp_path) as port:
            with contextlib.ExitStack() as stack:
                for _ in range(500):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.5))

    asyncio.run(connect_while_it_is_busy())


def test_one_connection_too_many_is_told_so_and_a_place_is_free_again(
    echo: ThreadingHTTPServer, tmp_path: Path
) -> None:
    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2 HTTP/1.1\r\n\r\n")
        found = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.close()
        return found + (await reader.read() if b"503" in found else b"")

    async def crowd() -> None:
        async with relay_here(echo.server_port, tmp_path, max_connections=2) as port:
            writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(2)]
            refused = await ask(port)
            assert refused.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in refused
            assert b"2 connections are open" in refused
            for writer in writers:
                writer.close()
            while b" 200 " not in await ask(port):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(crowd(), 30))


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v2/mod",
        f"POST {GENERATE} HTTP/1.1\r\nContent-Length: 9\r\n\r\n{{".encode(),
        b"GET /v2/health/live HTTP/1.1\r\n\r\nGET /v2",
    ],
)
def test_a_request_that_does_not_come_to_an_end_is_not_waited_for(
    echo: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(http_downstream, "REQUEST_S", 0.1)

    async def ask() -> bytes:
        async with relay_here(echo.server_port, tmp_path) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer

    answer = asyncio.run(ask())
    assert b"HTTP/1.1 408 " in answer and b"the request has not come within" in answer


def test_who_waits_for_an_answer_or_rests_is_not_hurried(
    echo: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_downstream, "REQUEST_S", 0.1)
    Echo.go_on.clear()

    async def ask() -> None:
        async with relay_here(echo.server_port, tmp_path) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                head = f"POST {GENERATE}?wait HTTP/1.1\r\nContent-Length: 8\r\n\r\n"
                writer.write(head.encode() + b'{"a": 1}\r\n')  # an empty line, as some send, begins no request
                await asyncio.sleep(0.3)  # longer than a request may take to come
                Echo.go_on.set()
                assert (await reader.readuntil(b'"a": 1}')).startswith(b"HTTP/1.1 200 ")
                await asyncio.sleep(0.3)
            writer.close()

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_a_connection_that_rests_is_closed_and_clients_make_another(
    echo: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tritonclient too, whose pool keeps them."""
    monkeypatch.setattr(http_downstream, "IDLE_S", 0.1)

    async def rest() -> None:
        async with relay_here(echo.server_port, tmp_path) as port:
            client = await asyncio.to_thread(InferenceServerClient, f"127.0.0.1:{port}")
            assert await asyncio.to_thread(client.is_server_ready)
            for request, end in ((LIVE, b"\r\n\r\n"), (b"GET /v2 HTTP/1.1\r\n\r\n", b"\r\n\r\n/v2")):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for _ in range(2):
                    writer.write(request)
                    assert (await reader.readuntil(end)).startswith(b"HTTP/1.1 200 ")
                assert await reader.read() == b"", "no word on a request that nobody has sent"
                writer.close()
            assert await asyncio.to_thread(client.is_server_ready), "its connection has rested longer"
            await asyncio.to_thread(client.close)

    asyncio.run(asyncio.wait_for(rest(), 30))
