"""What the OpenAI front costs: the same load through it and by gRPC to `ensemble`, by turns.

python -m tools.benchmarks.openai_front --output docs/results/openai-front.json

Time to first token: as clients see it, and what of it is not the scheduler's own, from a request's arrival (of ensemble
at `preprocess`, which tokenizes; the front does that itself) to the hand-over of its first response. The gRPC client is
perf_analyzer, the front's one only reads sockets; all share the machine's cores. No GPU needed.
"""

import contextlib
import json
import random
import selectors
import socket
import time
from collections import deque
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import psutil
import typer

from ensemble.tokenizer import Tokenizer
from tools.benchmarks.results import at_least, at_most, report
from tools.load.perf_analyzer import drive, text_inputs
from tools.load.prompts import one_token_pieces, random_text
from tools.load.records import Record
from tools.server.ports import free_ports
from tools.server.server_state import Metrics
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

PROMPT_LEN, OUTPUT_LEN = 20, 60
NUM_ROUNDS = 5  # of each way, by turns
REQUESTS_EACH = 12  # of a client, one after the other
NUM_STREAMS = 32
TIMEOUT_S = 60.0
TOLD_WITHIN_S = 10.0  # by the metrics
TTFT = "vllm:time_to_first_token_seconds"
MIN_THROUGHPUT, MAX_ADDED_MS = 0.8, 3.0
Inputs = list[dict[str, Any]]
Figures = dict[str, list[dict[str, float]]]  # way |-> those of each round


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None) -> None:
    with tiny_server(openai_port=free_ports(1)[0]) as server:
        found = [
            *throughput_rows(measure(server, NUM_STREAMS)),
            *ttft_rows("1 stream", measure(server, 1)),
        ]
    report(found, output)


def measure(server: TritonServer, count: int) -> Figures:
    """Of so many clients at once."""
    rng = random.Random(count)
    tokenizer = Tokenizer.from_dir(server.deployment.model.path)
    pieces = one_token_pieces(tokenizer, rng)
    found: Figures = {"ensemble": [], "front": []}
    for number in range(NUM_ROUNDS + 1):
        for way, load in {"ensemble": by_grpc, "front": by_front}.items():
            texts = [random_text(tokenizer, pieces, PROMPT_LEN, rng) for _ in range(REQUESTS_EACH * count)]
            inputs = [text_inputs(text, OUTPUT_LEN) for text in texts]
            before, before_s = Metrics(server), cpu_seconds(server)
            served = load(server, inputs, count)
            seconds = max(each.times[-1] for each in served)
            ttft_ms = [1e3 * each.ttft for each in served]
            figures = {
                "tokens_per_s": sum(each.num_tokens for each in served) / seconds,
                "ttft_ms": median(ttft_ms),
                "outside_ms": mean(ttft_ms) - mean_ttft_ms(server, before, len(served)),
                "cpu_us": 1e6 * (cpu_seconds(server) - before_s) / sum(len(each.times) for each in served),
            }
            if number > 0:  # the first warms up
                found[way].append(figures)
    return found


def mean_ttft_ms(server: TritonServer, before: Metrics, num_requests: int) -> float:
    """The scheduler's own, of so many requests since."""
    deadline = time.monotonic() + TOLD_WITHIN_S
    while (now := Metrics(server)).total(f"{TTFT}_count") < before.total(f"{TTFT}_count") + num_requests:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the metrics do not count {num_requests} requests")
        time.sleep(0.05)
    return 1e3 * (now.total(f"{TTFT}_sum") - before.total(f"{TTFT}_sum")) / num_requests


def throughput_rows(found: Figures) -> list[dict[str, Any]]:
    rates = {way: round(middle(found, way, "tokens_per_s")) for way in found}
    ratio = round(rates["front"] / rates["ensemble"], 3)
    cpu_us = round(middle(found, "front", "cpu_us"))
    name = f"{NUM_STREAMS} streams: output tokens"
    return [
        *({"name": f"{name}, {way}", "value": rate, "unit": "tokens/s"} for way, rate in rates.items()),
        at_least(f"{name}, front by ensemble", ratio, "ratio", MIN_THROUGHPUT),
        *ttft_rows(f"{NUM_STREAMS} streams", found),
        {"name": f"{NUM_STREAMS} streams: the front's CPU time, for an event", "value": cpu_us, "unit": "us"},
    ]


def ttft_rows(load: str, found: Figures) -> list[dict[str, Any]]:
    medians = {way: round(middle(found, way, "ttft_ms"), 2) for way in found}
    outside = {way: round(middle(found, way, "outside_ms"), 2) for way in found}
    added_ms = round(medians["front"] - medians["ensemble"], 2)
    return [
        *({"name": f"{load}: TTFT, median, {way}", "value": value, "unit": "ms"} for way, value in medians.items()),
        at_most(f"{load}: TTFT, median, that the front adds", added_ms, "ms", MAX_ADDED_MS),
        *(
            {"name": f"{load}: TTFT, mean, outside the scheduler, {way}", "value": value, "unit": "ms"}
            for way, value in outside.items()
        ),
    ]


def middle(found: Figures, way: str, name: str) -> float:
    return median(each[name] for each in found[way])


def by_grpc(server: TritonServer, inputs: Inputs, count: int) -> list[Record]:
    return drive(server.grpc_url, inputs, None, count)


def by_front(server: TritonServer, inputs: Inputs, count: int) -> list[Record]:
    """On one thread, which only waits for sockets: with a thread for each they wait for one another."""
    host, _, port = server.openai_url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    selector, waiting, served = selectors.DefaultSelector(), deque(inputs), list[Record]()
    start = time.perf_counter()
    with contextlib.ExitStack() as connections:
        for _ in range(count):
            connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=60))
            selector.register(connection, selectors.EVENT_READ, Stream(server, waiting.popleft(), connection, start))
        while len(served) < len(inputs):
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"{len(inputs) - len(served)} answers do not come")
            for key, _ in ready:
                if (record := key.data.read()) is not None:
                    served.append(record)
                    if waiting:
                        selector.modify(key.fileobj, key.events, Stream(server, waiting.popleft(), key.fileobj, start))
                    else:
                        selector.unregister(key.fileobj)
    return served


class Stream:
    """One answer on its way over a kept connection. A response is an event, at the time at which its last byte came."""

    def __init__(self, server: TritonServer, asked: dict[str, Any], connection: Any, start: float) -> None:
        body = json.dumps(
            {
                "model": server.deployment.model.name,
                "prompt": asked["text_input"][0],
                "max_tokens": asked["max_tokens"][0],
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        self._connection, self._start, self._num_tokens = connection, start, int(asked["max_tokens"][0])
        self._received, self._times = b"", list[float]()
        self._sent = time.perf_counter() - start
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    def read(self) -> Record | None:
        """What has come; the record when that is all."""
        data = self._connection.recv(65536)
        self._times += [time.perf_counter() - self._start] * data.count(b'"choices"')
        self._received += data
        if data and not self._received.endswith(b"0\r\n\r\n"):
            return None
        if b"data: [DONE]" not in self._received:
            raise RuntimeError(f"no whole answer: {self._received[-200:]!r}")
        tokens = [1] * len(self._times)
        # An event may hold several: which one does not matter here.
        tokens[-1] += self._num_tokens - len(self._times)
        sent = self._sent
        return Record(
            prompt_len=PROMPT_LEN, output_len=self._num_tokens, due=sent, sent=sent, times=self._times, tokens=tokens
        )


def cpu_seconds(server: TritonServer) -> float:
    times = psutil.Process(server.openai_pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    typer.run(main)
