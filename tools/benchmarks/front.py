"""What the way from the engine to the client carries: a model too small to matter, and many streams at once.

    python -m tools.benchmarks.front --output docs/results/front.json
    python -m tools.benchmarks.front --devices cuda:0 --output docs/results/front-h200.json

Tokens and responses a second through `ensemble`, and through `scheduler` alone, by requests in flight, and the CPU time
that each process takes for a response. Without a GPU workers, server and client share the machine's cores; on GPUs
it is LLaMA-2-7B, a replica on each, and 256 streams.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from ensemble.tokenizer import Tokenizer
from tools.bench_goodput import deployment_of
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.results import at_least, at_most, report
from tools.load.load import Load, put
from tools.load.summary import values_ms
from tools.load.workloads import Workload
from tools.proofs.gpu_smoke import READY_TIMEOUT_S, write_model_dir
from tools.server.server_state import processes
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

TINY_LOAD, TINY_IN_FLIGHT, TINY_REQUESTS_EACH = Workload(input_len=20, output_len=60), (1, 16, 64, 200), 12
GPU_LOAD, GPU_IN_FLIGHT, GPU_REQUESTS_EACH = Workload(input_len=128, output_len=200), (256,), 4
ENDPOINTS = ("ensemble", "scheduler")
MODELS = ("preprocess", "scheduler", "answer", "prefill", "decode")
GOALS = {  # through `ensemble`
    64: {"output tokens": 8000, "gap between responses, P99": 150.0},  # on two cores
    256: {"gap between responses, P99": 100.0},
}
OF_SCHEDULER = 0.95  # of its tokens/s, with 256 streams


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    in_flight: Annotated[list[int] | None, typer.Option(help="Default: 1, 16, 64, 200; on GPUs 256.")] = None,
    endpoint: Annotated[list[str] | None, typer.Option(help="Default: ensemble and scheduler.")] = None,
    devices: Annotated[str | None, typer.Option(help="GPUs; default: a tiny model on the CPU")] = None,
) -> None:
    rows: list[dict[str, Any]] = []
    load, number = TINY_LOAD, TINY_REQUESTS_EACH
    counts: tuple[int, ...] = TINY_IN_FLIGHT
    if devices is not None:
        load, counts, number = GPU_LOAD, GPU_IN_FLIGHT, GPU_REQUESTS_EACH
    with tiny_server() if devices is None else gpu_server(devices) as server:
        tokenizer = Tokenizer.from_dir(server.deployment.model.path)
        for name in endpoint or ENDPOINTS:
            for count in in_flight or counts:
                num_processes = 1 if devices is None else max(1, (os.cpu_count() or 1) // 2)
                rows += load_rows(
                    server,
                    tokenizer,
                    Load(load, number * count, max_concurrency=count, endpoint=name, seed=count),
                    num_processes,
                )
    if devices is not None:
        rows += shares(rows)
    report(rows, output)


@contextmanager
def gpu_server(devices: str) -> Iterator[TritonServer]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model_dir(path, SHAPES["LLaMA-2-7B"].config)
        fields = {"model.path": path, "model.load_format": "dummy", "model.dtype": "float16"}
        with TritonServer(deployment_of("colocated", devices, fields), log_path=Path(folder) / "log") as server:
            server.wait_ready(timeout_s=READY_TIMEOUT_S)
            yield server


def shares(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the ensemble carries of what the scheduler alone does."""
    tokens_per_s = {row["name"]: row["value"] for row in rows}
    for count in GPU_IN_FLIGHT:
        of_ensemble, of_scheduler = (
            tokens_per_s.get(f"{name}, {count} in flight: output tokens") for name in ENDPOINTS
        )
        if of_ensemble and of_scheduler:
            name = f"{count} in flight: ensemble's tokens/s over scheduler's"
            yield at_least(name, round(of_ensemble / of_scheduler, 3), "", OF_SCHEDULER)


def load_rows(server: TritonServer, tokenizer: Tokenizer, load: Load, num_processes: int) -> Iterator[dict[str, Any]]:
    endpoint, count = load.endpoint, load.max_concurrency
    requests = load.requests(tokenizer)
    put(server.grpc_url, load, requests[:count], num_processes=num_processes)  # is thrown away
    before = cpu_seconds(server)
    run = put(server.grpc_url, load, requests, num_processes=num_processes)
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
        goal = GOALS.get(count or 0, {}).get(name) if endpoint == "ensemble" else None
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
