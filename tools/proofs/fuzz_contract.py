"""Sends requests that are right, wrong and broken to the models, over HTTP and gRPC, and checks that each is answered.

    python -m tools.proofs.fuzz_contract --requests 10000 --output docs/results/fuzz.json

A request is a function of the seed and its number. No answer may take more than MAX_S, be a fault of the server's, or
have an HTTP status that docs/api.md does not name; no process may end, and every block must be free afterwards.
"""

import gzip
import http.client
import json
import queue
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as grpc
import typer
from rich.console import Console

from ensemble.serving.fields import ALIASES, INTERNAL, KINDS, Kind
from tools.benchmarks.results import at_most, exactly, report
from tools.server.server_state import Metrics, processes
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

MAX_S = 2.0
GIVE_UP_S = 20.0
NUM_THREADS = 4
REQUESTS_PER_CONNECTION = 50
MODELS = ("ensemble", "scheduler", "vllm_model")
STATUSES = {200, 400, 404, 413, 415, 503, 504}
FAULT = re.compile(r"internal error|Traceback|Stub process|not healthy|Failed to process", re.IGNORECASE)
NAMES = sorted(KINDS.keys() - INTERNAL)
MISSPELT = (
    "max_tokns",
    "temprature",
    "Stop",
    "",
    "x" * 200,
    "naïve",
    "triton_x",
    "timeout",
    "sequence_id",
    "model_name",
)
# An answer of hundreds of tokens is no fault, and takes longer than MAX_S beside others.
MAX_TOKENS = (0, -1, 1, 2, 5, 8, 600, 2**31 - 1, -(2**31))
VALUES: dict[Kind, tuple[Any, ...]] = {
    Kind.INT: (0, 1, 2, 3, 5, 16, -1, -2, 17, 101, 383, 384, 2**31 - 1, -(2**31)),
    Kind.FLOAT: (0, 0.5, 1, 1.5, 2, -1, -0.0, 1e-9, 1e30, 1e-40, 100.25),
    Kind.BOOL: (True, False),
    Kind.TEXT: (
        "",
        "abc",
        "The capital of",
        "\x00",
        "größe 🙂 你好",
        " ",
        "x " * 400,
        "[]",
        '[{"role":"user","content":"hi"}]',
    ),
    Kind.TEXTS: ([], [""], ["a"], ["the", ""], ["\x00", "🙂"], ["x" * 2000], ["w"] * 65),
    Kind.INTS: ([], [1], [5, 6, 7], [-1], [384], [3] * 200, [2**31 - 1]),
    Kind.FLOATS: ([], [1.0], [0.5, -3], [1e30]),
    Kind.OBJECT: (
        "",
        "{}",
        '{"5": 1}',
        '{"temperature": "0.5", "n": 2}',
        "[",
        "[]",
        "null",
        '{"stop": null, "top_k": "x"}',
        '{"384": 1}',
    ),
}
JSON_VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    "x",
    "",
    5,
    2.5,
    True,
    [1, "a"],
    10**20,
    -(10**20),
    "9" * 400,
    [[1]],
    {"a": [1]},
    1e308,
)
PACKED = ("messages", "sampling_parameters", "logit_bias")  # over HTTP JSON, or as strings of it
UNPACKED: tuple[Any, ...] = (
    [{"role": "user", "content": "größe"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": "user"}],
    [[]],
    {"5": 1},
    {"temperature": 0.5, "stop": ["x"], "seed": None},
    {"parameters": {}},
)
LARGE = b" " * (5 << 18)  # more than the relay keeps of a request
DTYPES = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "INT64": np.int64}
DTYPE_OF = {Kind.INT: "INT32", Kind.FLOAT: "FP32", Kind.BOOL: "BOOL", Kind.INTS: "INT32", Kind.FLOATS: "FP32"}
BROKEN = (
    b"",
    b"{",
    b"[1]",
    b'"x"',
    b"null",
    b'{"text_input":',
    b'{"text_input": "\xff"}',
    b"[" * 2000,
    b'{"a":1}{"b":2}',
    b"\x00" * 10,
)


@dataclass(slots=True)
class Outcomes:
    """What came of the requests so far; shared by the threads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, outcome: str, seconds: float, fault: str | None) -> None:
        with self.lock:
            self.counts[outcome] += 1
            self.longest_s = max(self.longest_s, seconds)
            if fault is not None:
                self.faults.append(fault)


def some_fields(rng: random.Random) -> dict[str, Any]:
    """Names with values of their kinds, most of them right."""
    fields: dict[str, Any] = {"text_input": "abc", "max_tokens": rng.choice((1, 2, 4))}
    for name in rng.sample(NAMES, rng.randint(0, 5)):
        is_limit = ALIASES.get(name, name) == "max_tokens"
        fields[name] = rng.choice(MAX_TOKENS if is_limit else VALUES[KINDS[name]])
    if rng.random() < 0.1:
        del fields["text_input"]
    return fields


class HttpClient:
    def __init__(self, server: TritonServer) -> None:
        address = server.http_url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(address, timeout=GIVE_UP_S)

    def send(self, rng: random.Random) -> tuple[str, str | None]:
        """The outcome, and what is wrong with it."""
        body, headers = self._body(rng)
        path = f"/v2/models/{rng.choice(MODELS)}/{rng.choice(('generate', 'generate_stream'))}"
        try:
            is_chunked = rng.random() < 0.05
            sent = iter((body[:7], body[7:])) if is_chunked and len(body) > 7 else body
            self._connection.request("POST", path, sent, headers, encode_chunked=sent is not body)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return "HTTP connection lost", f"{type(error).__name__}: {error}: {body[:200]!r}"
        status, text = response.status, answer.decode(errors="replace")
        said = f"HTTP {status} {text[:300]}: {path} {body[:300]!r}"
        if status not in STATUSES or FAULT.search(text):
            return f"HTTP {status}", said
        if status == 503 and response.headers["Retry-After"] is None:
            return f"HTTP {status}", f"without Retry-After: {said}"
        return f"HTTP {status}", None

    def _body(self, rng: random.Random) -> tuple[bytes, dict[str, str]]:
        if rng.random() < 0.05:
            return rng.choice(BROKEN), {}
        fields = some_fields(rng)
        if rng.random() < 0.3:
            fields[rng.choice(NAMES)] = rng.choice(JSON_VALUES)
        if rng.random() < 0.1:
            fields[rng.choice(MISSPELT)] = rng.choice(JSON_VALUES)
        if rng.random() < 0.2:
            moved = rng.sample(sorted(fields), rng.randint(0, len(fields)))
            fields["parameters"] = {name: fields.pop(name) for name in moved}
        if rng.random() < 0.02:
            fields["parameters"] = rng.choice(JSON_VALUES)
        if rng.random() < 0.1:
            fields[rng.choice(PACKED)] = rng.choice(UNPACKED)
            fields.pop(rng.choice(("text_input", "seed")), None)
        body = json.dumps(fields).encode()
        if rng.random() < 0.02:
            body = body[:1] + LARGE + body[1:]
        if rng.random() < 0.05:
            return body, {"Expect": "100-continue"}
        if rng.random() < 0.05:
            return gzip.compress(body), {"Content-Encoding": rng.choice(("gzip", "deflate", "br"))}
        return body, {}

    def close(self) -> None:
        self._connection.close()


class GrpcClient:
    """One stream; one request at a time."""

    def __init__(self, server: TritonServer) -> None:
        self._client = grpc.InferenceServerClient(server.grpc_url)
        self._events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._events.put((result, error)))
        self._num_sent = 0

    def send(self, rng: random.Random) -> tuple[str, str | None]:
        model = rng.choice(MODELS)
        fields = some_fields(rng)
        tensors = [self._tensor(rng, name, value, model) for name, value in fields.items()]
        parameters = {}
        if rng.random() < 0.3:
            for name in rng.sample([*NAMES, *(name for name in MISSPELT if name)], rng.randint(1, 3)):
                if not name.startswith(("triton_", "sequence_", "timeout", "priority")):
                    parameters[name] = rng.choice((1, -5, "x", "", True, 0.5, "8", '{"n": 1}'))
        self._num_sent += 1
        request_id = str(self._num_sent)
        said = f"{model} {[(tensor.name(), tensor.datatype(), tensor.shape()) for tensor in tensors]} {parameters}"
        self._client.async_stream_infer(
            model, tensors, request_id=request_id, parameters=parameters, enable_empty_final_response=True
        )
        return self._receive(request_id, said)

    def _receive(self, request_id: str, said: str) -> tuple[str, str | None]:
        while True:
            try:
                result, error = self._events.get(timeout=GIVE_UP_S)
            except queue.Empty:
                return "gRPC unanswered", f"no answer: {said}"
            if error is not None:
                message = str(error)
                return "gRPC refused", f"gRPC {message[:300]}: {said}" if FAULT.search(message) else None
            response = result.get_response()
            if response.id == request_id and response.parameters["triton_final_response"].bool_param:
                return "gRPC answered", None

    def _tensor(self, rng: random.Random, name: str, value: Any, model: str) -> grpc.InferInput:
        dtype = DTYPE_OF.get(KINDS[name], "BYTES")
        if ALIASES.get(name, name) == "seed":
            dtype, value = "UINT64", abs(value)
        if rng.random() < 0.05:
            dtype = rng.choice([*DTYPES, "BYTES"])
        elements = value if isinstance(value, list) else [value]
        if dtype == "BYTES":
            array = np.array([str(element).encode() for element in elements], object)
        else:
            array = np.array([self._number(element, dtype) for element in elements], DTYPES[dtype])
        if rng.random() < 0.05:
            array = array[:0] if rng.random() < 0.5 else np.concatenate([array, array])
        if (model == "ensemble") != (rng.random() < 0.03):
            array = array[np.newaxis]
        tensor = grpc.InferInput(name, list(array.shape), dtype)
        tensor.set_data_from_numpy(array)
        return tensor

    def _number(self, element: Any, dtype: str) -> Any:
        if dtype == "FP32":
            return element if isinstance(element, int | float) else float("nan")
        if isinstance(element, str):
            return 7
        return int(max(-1, min(element, 2**31 - 1))) if dtype != "UINT64" else int(min(abs(element), 2**62))

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def work(server: TritonServer, seed: int, numbers: "queue.SimpleQueue[int]", outcomes: Outcomes) -> None:
    clients: dict[str, HttpClient | GrpcClient] = {}
    num_sent = 0
    while True:
        try:
            number = numbers.get_nowait()
        except queue.Empty:
            break
        rng = random.Random(f"{seed}:{number}")
        front = rng.choice(("http", "grpc"))
        if num_sent % REQUESTS_PER_CONNECTION == 0:
            for client in clients.values():
                client.close()
            clients = {"http": HttpClient(server), "grpc": GrpcClient(server)}
        num_sent += 1
        start = time.monotonic()
        outcome, fault = clients[front].send(rng)
        seconds = time.monotonic() - start
        outcomes.add(outcome, seconds, None if fault is None else f"request {number}: {fault}")
    for client in clients.values():
        client.close()


def fuzz(server: TritonServer, num_requests: int, seed: int) -> list[dict[str, Any]]:
    """The rows of the result; prints the faults."""
    outcomes, numbers = Outcomes(), queue.SimpleQueue[int]()
    for number in range(num_requests):
        numbers.put(number)
    before = {process.pid for process in processes(server)}
    start = time.monotonic()
    threads = [threading.Thread(target=work, args=(server, seed, numbers, outcomes)) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    ended = before - {process.pid for process in processes(server)}
    deadline = time.monotonic() + 5
    while Metrics(server).blocks_in_use and time.monotonic() < deadline:
        time.sleep(0.1)
    for fault in outcomes.faults[:20]:
        Console(stderr=True, highlight=False).print(fault, markup=False)
    return [
        {"name": "requests", "value": num_requests, "unit": "requests"},
        {"name": "seed", "value": seed, "unit": ""},
        {"name": "time", "value": round(seconds, 1), "unit": "s"},
        *({"name": name, "value": count, "unit": "requests"} for name, count in sorted(outcomes.counts.items())),
        exactly("requests with a fault of the server's", len(outcomes.faults), "requests", 0),
        at_most("longest time to an answer's end", round(outcomes.longest_s, 2), "s", MAX_S),
        exactly("processes ended", len(ended), "processes", 0),
        exactly("blocks in use afterwards", Metrics(server).blocks_in_use, "blocks", 0),
    ]


def main(
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 10_000,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """On a server of its own, of a tiny model on the CPU. Exit status 1 if there was a fault."""
    with tiny_server() as server:
        rows = fuzz(server, requests, seed)
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
