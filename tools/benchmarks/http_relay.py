"""What the HTTP relay costs: the same requests through it and to the Triton server itself, by turns.

python -m tools.benchmarks.http_relay --output docs/results/http-relay.json
"""

import http.client
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.benchmarks.results import at_least, at_most, report
from tools.server.tiny_server import tiny_server

NUM_ROUNDS = 5  # of each way, by turns
NUM_SMALL, NUM_STREAMS, NUM_CLIENTS = 400, 40, 64  # requests in a round: small, one after the other, at once
NUM_TOKENS = 100
MAX_ADDED_MS, MAX_ADDED_WITH_CONNECTION_MS = 0.25, 1.0
MIN_THROUGHPUT = 0.95
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Way:
    """To the Triton server, and what was measured on it: a value for each round."""

    netloc: str
    small_ms: list[float]
    one_token_ms: list[float]
    ttft_ms: list[float]
    tokens_per_s: list[float]


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None) -> None:
    with tiny_server() as server:
        direct, relayed = (Way(url.split("/")[-1], [], [], [], []) for url in (server.direct_http_url, server.http_url))
        measure(direct)  # warms up, and is thrown away
        measure(relayed)
        direct, relayed = Way(direct.netloc, [], [], [], []), Way(relayed.netloc, [], [], [], [])
        num_events, cpu_s = 0, 0.0
        for _ in range(NUM_ROUNDS):
            measure(direct)
            before_s = cpu_seconds(server.relay_pid)
            num_events += measure(relayed)
            cpu_s += cpu_seconds(server.relay_pid) - before_s
    report(rows(direct, relayed, cpu_s, num_events), output)


def rows(direct: Way, relayed: Way, cpu_s: float, num_events: int) -> list[dict[str, Any]]:
    def added(name: str) -> float:
        return round(float(statistics.median(getattr(relayed, name)) - statistics.median(getattr(direct, name))), 3)

    rates = [round(statistics.median(way.tokens_per_s)) for way in (direct, relayed)]
    return [
        at_most("time that the relay adds to a health check", added("small_ms"), "ms", MAX_ADDED_MS),
        at_most(
            "time that it adds to a token, with a new connection",
            added("one_token_ms"),
            "ms",
            MAX_ADDED_WITH_CONNECTION_MS,
        ),
        {"name": "time that it adds to the first of 100 tokens", "value": added("ttft_ms"), "unit": "ms"},
        {"name": f"{NUM_CLIENTS} streams, to the Triton server itself", "value": rates[0], "unit": "tokens/s"},
        {"name": f"{NUM_CLIENTS} streams, through the relay", "value": rates[1], "unit": "tokens/s"},
        at_least("throughput, through the relay by direct", round(rates[1] / rates[0], 3), "ratio", MIN_THROUGHPUT),
        {"name": "the relay's CPU time, for an event", "value": round(1e6 * cpu_s / num_events, 1), "unit": "us"},
    ]


def measure(way: Way) -> int:
    """One round; returns the responses and events."""
    connection = http.client.HTTPConnection(way.netloc, timeout=30)
    way.small_ms.append(statistics.median(health_ms(connection) for _ in range(NUM_SMALL)))
    connection.close()
    way.one_token_ms.append(statistics.median(stream(way.netloc, 1)[0] for _ in range(NUM_STREAMS)))
    alone = [stream(way.netloc) for _ in range(NUM_STREAMS)]
    way.ttft_ms.append(statistics.median(ttft_ms for ttft_ms, _ in alone))
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        together = list(pool.map(stream, [way.netloc] * NUM_CLIENTS))
    way.tokens_per_s.append(NUM_CLIENTS * NUM_TOKENS / (time.perf_counter() - start))
    return NUM_SMALL + NUM_STREAMS + sum(num_events for _, num_events in alone + together)


def health_ms(connection: http.client.HTTPConnection) -> float:
    start = time.perf_counter()
    connection.request("GET", "/v2/health/ready")
    connection.getresponse().read()
    return 1e3 * (time.perf_counter() - start)


def stream(netloc: str, num_tokens: int = NUM_TOKENS) -> tuple[float, int]:
    """One request: milliseconds to its first event, and its events."""
    asked = {"input_ids": [5] * 16, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(netloc, timeout=60)
    start = time.perf_counter()
    connection.request("POST", "/v2/models/scheduler/generate_stream", json.dumps(asked))
    response = connection.getresponse()
    response.readline()
    ttft_ms = 1e3 * (time.perf_counter() - start)
    num_events = 1 + response.read().count(b"data:")
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}")
    return ttft_ms, num_events


def cpu_seconds(pid: int) -> float:
    """What a process has used, its own and the system's time for it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S


if __name__ == "__main__":
    typer.run(main)
