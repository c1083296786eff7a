"""What the OpenAI front costs: the same load through it and by gRPC to `ensemble`, by turns.

python -m tools.benchmarks.openai_front --output docs/results/openai-front.json

Throughput with so many streams that the machine is full. The time to the first token of one stream, and at one rate of
arrivals for both: a way that serves more has its streams wait elsewhere. The gRPC client is perf_analyzer, the front's
one only reads sockets; all share the machine's cores. No GPU needed.
"""

import itertools
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer

from ensemble.tokenizer import Tokenizer
from tools.benchmarks.results import at_least, at_most, report
from tools.benchmarks.serving_load import Lengths, Served, drive, make_inputs
from tools.installation.model_source import model_name
from tools.server.ports import free_ports
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

LENGTHS = Lengths(prompt=20, output=60)
NUM_ROUNDS = 5  # of each way, by turns
REQUESTS_EACH = 12  # of a client, one after the other
NUM_STREAMS = 32
NUM_ARRIVALS, ARRIVALS_PER_S = 200, 25.0  # a third of what the machine can do
MIN_THROUGHPUT, MAX_ADDED_MS = 0.8, 3.0
Inputs = list[dict[str, Any]]
Figures = dict[str, list[dict[str, float]]]  # way |-> those of each round


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None) -> None:
    with tiny_server(openai_port=free_ports(1)[0]) as server:
        found = [
            *throughput_rows(measure(server, REQUESTS_EACH * NUM_STREAMS, NUM_STREAMS)),
            *ttft_rows("1 stream", measure(server, REQUESTS_EACH, 1)),
            *ttft_rows(f"{ARRIVALS_PER_S:.0f} arrivals/s", measure(server, NUM_ARRIVALS, None)),
        ]
    report(found, output)


def measure(server: TritonServer, num_requests: int, count: int | None) -> Figures:
    """Of requests by so many clients at once; None: at random times."""
    rng = random.Random(num_requests)
    tokenizer = Tokenizer.from_dir(server.deployment.model.path)
    found: Figures = {"ensemble": [], "front": []}
    for number in range(NUM_ROUNDS + 1):
        inputs = make_inputs(tokenizer, [LENGTHS] * num_requests, rng)
        gaps_s = None if count else [rng.expovariate(ARRIVALS_PER_S) for _ in inputs]
        by_grpc = figures(drive(server.grpc_url, inputs, gaps_s, count or num_requests))
        before_s = cpu_seconds(server)
        by_front = figures(drive_front(server, inputs, gaps_s, count or num_requests))
        by_front["cpu_us"] = 1e6 * (cpu_seconds(server) - before_s) / by_front.pop("events")
        if number > 0:  # the first warms up
            found["ensemble"].append(by_grpc)
            found["front"].append(by_front)
    return found


def throughput_rows(found: Figures) -> list[dict[str, Any]]:
    rates = {way: round(middle(found, way, "tokens_per_s")) for way in found}
    ratio = round(rates["front"] / rates["ensemble"], 3)
    cpu_us = round(middle(found, "front", "cpu_us"))
    name = f"{NUM_STREAMS} streams: output tokens"
    return [
        *({"name": f"{name}, {way}", "value": rate, "unit": "tokens/s"} for way, rate in rates.items()),
        at_least(f"{name}, front by ensemble", ratio, "ratio", MIN_THROUGHPUT),
        *ttft_rows(f"{NUM_STREAMS} streams", found)[:2],
        {"name": f"{NUM_STREAMS} streams: the front's CPU time, for an event", "value": cpu_us, "unit": "us"},
    ]


def ttft_rows(load: str, found: Figures) -> list[dict[str, Any]]:
    times = {way: round(middle(found, way, "ttft_ms"), 2) for way in found}
    added_ms = round(times["front"] - times["ensemble"], 2)
    return [
        *({"name": f"{load}: TTFT, median, {way}", "value": value, "unit": "ms"} for way, value in times.items()),
        at_most(f"{load}: TTFT, that the front adds", added_ms, "ms", MAX_ADDED_MS),
    ]


def middle(found: Figures, way: str, name: str) -> float:
    return median(each[name] for each in found[way])


def figures(served: list[Served]) -> dict[str, float]:
    seconds = max(each.responses[-1] for each in served)
    return {
        "tokens_per_s": sum(each.num_tokens for each in served) / seconds,
        "ttft_ms": median(each.milliseconds("ttft")[0] for each in served),
        "events": sum(len(each.responses) for each in served),
    }


def drive_front(server: TritonServer, inputs: Inputs, gaps_s: list[float] | None, count: int) -> list[Served]:
    """Sends each request once: after gaps from one to the next, or so many at once."""
    start = time.perf_counter()
    due_s = list(itertools.accumulate(gaps_s)) if gaps_s else [0.0] * len(inputs)

    def send(asked: dict[str, Any], due: float) -> Served:
        time.sleep(max(0.0, start + due - time.perf_counter()))
        return stream(server, asked, start)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(send, inputs, due_s))


def stream(server: TritonServer, asked: dict[str, Any], start: float) -> Served:
    """A response is an event, at the time at which its last byte came."""
    body = json.dumps(
        {
            "model": model_name(server.deployment.model.path),
            "prompt": asked["text_input"][0],
            "max_tokens": asked["max_tokens"][0],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    host, _, port = server.openai_url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    sent = time.perf_counter() - start
    received, times = b"", list[float]()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        while data := connection.recv(65536):
            times += [time.perf_counter() - start] * data.count(b'"choices"')
            received += data
    if b"data: [DONE]" not in received:
        raise RuntimeError(f"no whole answer: {received[-200:]!r}")
    return Served(sent, times, asked["max_tokens"][0], 1)


def cpu_seconds(server: TritonServer) -> float:
    times = psutil.Process(server.openai_pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    typer.run(main)
