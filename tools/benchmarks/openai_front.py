"""What the OpenAI front costs: the same load through it and by gRPC to `ensemble`, by turns.

python -m tools.benchmarks.openai_front --output docs/results/openai-front.json

The gRPC client is perf_analyzer, the front's one only reads sockets; all share the machine's cores. No GPU needed.
"""

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
MIN_THROUGHPUT, MAX_ADDED_MS = 0.8, 3.0
Inputs = list[dict[str, Any]]


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None) -> None:
    with tiny_server(openai_port=free_ports(1)[0]) as server:
        alone, together = measure(server, 1), measure(server, NUM_STREAMS)
    report([*rows(alone, 1), *rows(together, NUM_STREAMS)], output)


def measure(server: TritonServer, count: int) -> dict[str, list[dict[str, float]]]:
    """Way |-> the figures of each round."""
    rng = random.Random(count)
    tokenizer = Tokenizer.from_dir(server.deployment.model.path)
    found: dict[str, list[dict[str, float]]] = {"ensemble": [], "front": []}
    for number in range(NUM_ROUNDS + 1):
        inputs = make_inputs(tokenizer, [LENGTHS] * REQUESTS_EACH * count, rng)
        by_grpc = figures(drive(server.grpc_url, inputs, None, count))
        before_s = cpu_seconds(server)
        by_front = figures(drive_front(server, inputs, count))
        by_front["cpu_us"] = 1e6 * (cpu_seconds(server) - before_s) / by_front.pop("events")
        if number > 0:  # the first warms up
            found["ensemble"].append(by_grpc)
            found["front"].append(by_front)
    return found


def rows(found: dict[str, list[dict[str, float]]], count: int) -> list[dict[str, Any]]:
    def middle(way: str, name: str) -> float:
        return median(each[name] for each in found[way])

    rates = {way: round(middle(way, "tokens_per_s")) for way in found}
    ratio = round(rates["front"] / rates["ensemble"], 3)
    added_ms = round(middle("front", "ttft_ms") - middle("ensemble", "ttft_ms"), 2)
    name, added = f"{count} in flight: output tokens, front by ensemble", f"{count} in flight: TTFT that the front adds"
    return [
        *(
            {"name": f"{count} in flight: output tokens, {way}", "value": rate, "unit": "tokens/s"}
            for way, rate in rates.items()
        ),
        at_least(name, ratio, "ratio", MIN_THROUGHPUT),
        *(
            {"name": f"{count} in flight: TTFT, median, {way}", "value": round(middle(way, "ttft_ms"), 2), "unit": "ms"}
            for way in found
        ),
        at_most(added, added_ms, "ms", MAX_ADDED_MS),
        {
            "name": f"{count} in flight: CPU time of the front, for an event",
            "value": round(middle("front", "cpu_us")),
            "unit": "us",
        },
    ]


def figures(served: list[Served]) -> dict[str, float]:
    seconds = max(each.responses[-1] for each in served)
    return {
        "tokens_per_s": sum(each.num_tokens for each in served) / seconds,
        "ttft_ms": median(each.milliseconds("ttft")[0] for each in served),
        "events": sum(len(each.responses) for each in served),
    }


def drive_front(server: TritonServer, inputs: Inputs, count: int) -> list[Served]:
    """Sends each request once, so many at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda each: stream(server, each, start), inputs))


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
