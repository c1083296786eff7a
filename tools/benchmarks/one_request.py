"""One request at a time to an idle server of a tiny model on the CPU: this tree against another one, by turns.

    git worktree add ../before 249fdeb      with a .venv of its own, made by that tree's tools.bootstrap
    python -m tools.benchmarks.one_request ../before --output docs/results/one-request.json

What is measured is the way around the model: front, router, hand-off, and back. Both servers run all the time, and each
request to one is followed by the same request to the other, on connections that are kept. Each round starts both anew.
First tokens leave as soon as they are computed, as the other tree has it; with --first-token held, when their sequences
have joined decode, which is this tree's default.
"""

import http.client
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as grpc
import typer
from rich.console import Console

from tools.benchmarks.results import at_most, report
from tools.installation.server_files import ServerError
from tools.proofs.grpc_request import Inputs, ModelName, make_tensors

TREE = Path(__file__).parents[2]
# Run by each tree's own interpreter; the folders of the tools differ by tree.
SERVE = """
import sys
try:
    from tools.server.tiny_server import tiny_server
    starting = tiny_server(first_token=sys.argv[1])
except ImportError:
    from tools.tiny_server import tiny_server
    starting = tiny_server()
with starting as server:
    print(server.grpc_url, server.http_url, flush=True)
    sys.stdin.read()
"""
PROMPT, NUM_TOKENS = "Once upon a time ", 8
NUM_WARM_UP = 20
REQUEST_TIMEOUT_S = 30.0
PAUSE_S = 0.02  # before each request: all servers are idle, also behind what their clients see
GOAL = 1.0  # of the other tree's median TTFT

Times = tuple[float, float]  # milliseconds to the first response and to the last
Send = Callable[[], Times]


@contextmanager
def serving(tree: Path, first_token: str) -> Iterator[tuple[str, str]]:
    """Its gRPC and HTTP addresses."""
    command = [str(tree / ".venv/bin/python"), "-c", SERVE, first_token]
    process = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        urls = process.stdout.readline().split()
        if len(urls) != 2:
            raise ServerError(f"{tree}: its server did not start")
        yield urls[0], urls[1]
    finally:
        process.stdin.close()
        process.wait(timeout=60)


class GrpcClient:
    """Sends on one stream."""

    def __init__(self, url: str, model: ModelName) -> None:
        self._client, self._model = grpc.InferenceServerClient(url), model
        self._received_at: list[float] = []
        self._errors: list[Exception] = []
        self._ended = threading.Event()
        inputs: Inputs = {
            "text_input": np.array([PROMPT.encode()], np.object_),
            "max_tokens": np.array([NUM_TOKENS], np.int32),
            "temperature": np.zeros(1, np.float32),
            "ignore_eos": np.ones(1, bool),
            "stream": np.ones(1, bool),
        }
        is_batched = model == "ensemble"
        self._tensors = make_tensors({name: each[np.newaxis] if is_batched else each for name, each in inputs.items()})
        self._client.start_stream(self._receive)

    def send(self) -> Times:
        self._received_at.clear()
        self._ended.clear()
        start = time.perf_counter()
        self._client.async_stream_infer(self._model, self._tensors, enable_empty_final_response=True)
        if not self._ended.wait(REQUEST_TIMEOUT_S) or self._errors:
            raise ServerError(f"a request: {self._errors[0] if self._errors else 'no end'}")
        return (self._received_at[0] - start) * 1e3, (self._received_at[-1] - start) * 1e3

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()

    def _receive(self, result: Any, error: Exception | None) -> None:
        if error is not None:
            self._errors.append(error)
            self._ended.set()
            return
        response = result.get_response()
        if response.outputs:
            self._received_at.append(time.perf_counter())
        if response.parameters["triton_final_response"].bool_param:
            self._ended.set()


class HttpClient:
    """Sends on one connection, to the ensemble."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=REQUEST_TIMEOUT_S)
        asked = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        self._body = json.dumps(asked)

    def send(self) -> Times:
        start = time.perf_counter()
        self._connection.request("POST", "/v2/models/ensemble/generate_stream", self._body)
        response = self._connection.getresponse()
        received_at = [time.perf_counter() for line in iter(response.readline, b"") if line.startswith(b"data:")]
        if response.status != 200 or not received_at:
            raise ServerError(f"a request over HTTP: status {response.status}")
        return (received_at[0] - start) * 1e3, (received_at[-1] - start) * 1e3

    def close(self) -> None:
        self._connection.close()


def one_round(servers: dict[str, tuple[Path, str]], count: int) -> dict[str, dict[str, list[Times]]]:
    """Path |-> for each server, the times of `count` requests."""
    with ExitStack() as stack:
        paths: dict[str, dict[str, Send]] = {"scheduler, gRPC": {}, "ensemble, gRPC": {}, "ensemble, HTTP": {}}
        for name, (tree, first_token) in servers.items():
            grpc_url, http_url = stack.enter_context(serving(tree, first_token))
            clients: list[GrpcClient | HttpClient]
            clients = [GrpcClient(grpc_url, "scheduler"), GrpcClient(grpc_url, "ensemble"), HttpClient(http_url)]
            for sends, client in zip(paths.values(), clients, strict=True):
                sends[name] = client.send
                stack.callback(client.close)
        times: dict[str, dict[str, list[Times]]] = {path: {name: [] for name in servers} for path in paths}
        for path, sends in paths.items():
            for index in range(NUM_WARM_UP + count):
                for name, send in sends.items():
                    time.sleep(PAUSE_S)
                    took = send()
                    if index >= NUM_WARM_UP:
                        times[path][name].append(took)
        return times


def rows_of(path: str, times: dict[str, list[Times]]) -> list[dict[str, Any]]:
    ttft = {name: statistics.median(first for first, _ in found) for name, found in times.items()}
    e2e = {name: statistics.median(last for _, last in found) for name, found in times.items()}
    last = f"{path}: last of {NUM_TOKENS} tokens, P50"
    return [
        *({"name": f"{path}: TTFT P50, {name}", "value": round(ttft[name], 2), "unit": "ms"} for name in ttft),
        at_most(f"{path}: TTFT P50, now over before", round(ttft["now"] / ttft["before"], 2), "times", GOAL),
        *({"name": f"{last}, {name}", "value": round(e2e[name], 2), "unit": "ms"} for name in e2e),
    ]


def main(
    before: Annotated[Path, typer.Argument(help="the other tree, with its .venv")],
    requests: Annotated[int, typer.Option(min=1, help="to each server, by each path, in each round")] = 300,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    first_token: Annotated[str, typer.Option(help="at_once or held")] = "at_once",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Exit status 1 if the first token comes later than the other tree's."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=before, capture_output=True, text=True, check=False)
    servers = {"now": (TREE, first_token), "before": (before.absolute(), "")}
    times: dict[str, dict[str, list[Times]]] = {}
    for index in range(rounds):
        order = sorted(servers, reverse=index % 2 == 1)
        for path, by_server in one_round({name: servers[name] for name in order}, requests).items():
            for name, found in by_server.items():
                times.setdefault(path, {}).setdefault(name, []).extend(found)
        Console(highlight=False).print(f"round {index + 1} of {rounds}")
    rows: list[dict[str, Any]] = [{"name": "before: the commit", "value": head.stdout.strip(), "unit": ""}]
    rows += [row for path, by_server in times.items() for row in rows_of(path, by_server)]
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
