"""What the way from the engine to the client carries: a model too small to matter, and many streams at once.

    python -m tools.benchmarks.front --output docs/results/front.json

Tokens and responses a second through `ensemble`, and through `scheduler` alone, by requests in flight, and the CPU time
that each process takes for a response. Workers, server and client share the machine's cores. No GPU needed.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from ensemble.tokenizer import Tokenizer
from tools.benchmarks.results import at_least, at_most, report
from tools.load.load import Load, put
from tools.load.summary import values_ms
from tools.load.workloads import Workload
from tools.server.server_state import processes
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

WORKLOAD = Workload(input_len=20, output_len=60)
REQUESTS_EACH = 12  # of a stream, one after the other
MODELS = ("preprocess", "scheduler", "answer", "prefill", "decode")
GOALS = {"output tokens": 8000, "gap between responses, P99": 150.0}  # of 64 streams through `ensemble` on two cores


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    in_flight: Annotated[list[int] | None, typer.Option(help="Default: 1, 16, 64, 200.")] = None,
    endpoint: Annotated[list[str] | None, typer.Option(help="Default: ensemble and scheduler.")] = None,
) -> None:
    rows: list[dict[str, Any]] = []
    with tiny_server() as server:
        tokenizer = Tokenizer.from_dir(server.deployment.model.path)
        for name in endpoint or ("ensemble", "scheduler"):
            for count in in_flight or (1, 16, 64, 200):
                rows += load_rows(server, tokenizer, name, count)
    report(rows, output)


def load_rows(server: TritonServer, tokenizer: Tokenizer, endpoint: str, count: int) -> Iterator[dict[str, Any]]:
    load = Load(WORKLOAD, REQUESTS_EACH * count, max_concurrency=count, endpoint=endpoint, seed=count)
    requests = load.requests(tokenizer)
    put(server.grpc_url, load, requests[:count], num_processes=1)  # is thrown away
    before = cpu_seconds(server)
    run = put(server.grpc_url, load, requests, num_processes=1)
    taken = {name: seconds - before.get(name, 0.0) for name, seconds in cpu_seconds(server).items()}
    taken["client"] = run.client_cpu_share * run.duration
    num_responses = sum(len(each.times) for each in run.records)
    figures = {
        "output tokens": (round(sum(each.num_tokens for each in run.records) / run.duration), "tokens/s"),
        "responses": (round(num_responses / run.duration), "responses/s"),
        "TTFT, median": (round(median(values_ms(run.records, "ttft")), 1), "ms"),
        "gap between responses, P99": (round(float(np.percentile(values_ms(run.records, "itl"), 99)), 1), "ms"),
        "longest gap of a request, P90": (round(float(np.percentile(values_ms(run.records, "gap"), 90)), 1), "ms"),
        "TPOT, median": (round(median(values_ms(run.records, "tpot")), 2), "ms"),
        "client's lag, P99": (round(run.lag_p99_ms, 1), "ms"),
        **{
            f"CPU time of {name}, for a response": (round(1e6 * each / num_responses), "us")
            for name, each in sorted(taken.items())
        },
    }
    for name, (value, unit) in figures.items():
        label = f"{endpoint}, {count} in flight: {name}"
        goal = GOALS.get(name) if (endpoint, count) == ("ensemble", 64) else None
        if goal is None:
            yield {"name": label, "value": value, "unit": unit}
        else:
            yield (at_least if unit == "tokens/s" else at_most)(label, value, unit, goal)


def cpu_seconds(server: TritonServer) -> dict[str, float]:
    """Of the server's program, its models' stubs, and the workers together."""
    seconds: dict[str, float] = {}
    for process in processes(server):
        arguments = process.cmdline()
        models = [model for model in MODELS if any(f"/{model}/" in argument for argument in arguments)]
        relay = "relay" if process.pid == server.relay_pid else "workers"
        name = "tritonserver" if process.pid == server.pid else models[0] if models else relay
        times = process.cpu_times()
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


if __name__ == "__main__":
    typer.run(main)
