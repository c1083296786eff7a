"""What the way from the engine to the client carries: a model too small to matter, and many streams at once.

    python -m tools.benchmarks.front --output docs/results/front.json

Tokens and responses a second through `ensemble`, by requests in flight, and the CPU time that each of the server's
processes takes for a response. Workers, server and perf_analyzer share the machine's cores. No GPU needed.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from ensemble.tokenizer import Tokenizer
from tools.benchmarks.results import report
from tools.benchmarks.serving_load import Lengths, at, drive, make_inputs
from tools.server.server_state import processes
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

LENGTHS = Lengths(prompt=20, output=60)
REQUESTS_EACH = 12  # of a client, one after the other
MODELS = ("preprocess", "scheduler", "postprocess", "prefill", "decode")


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    in_flight: Annotated[list[int] | None, typer.Option(help="Default: 1, 16, 64, 200.")] = None,
) -> None:
    rows: list[dict[str, Any]] = []
    with tiny_server() as server:
        for count in in_flight or (1, 16, 64, 200):
            rows += load_rows(server, Tokenizer.from_dir(server.deployment.model.path), count)
    report(rows, output)


def load_rows(server: TritonServer, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(count)
    drive(server.grpc_url, make_inputs(tokenizer, [LENGTHS] * count, rng), None, count)  # is thrown away
    inputs = make_inputs(tokenizer, [LENGTHS] * REQUESTS_EACH * count, rng)
    before = cpu_seconds(server)
    served = drive(server.grpc_url, inputs, None, count)
    taken = {name: seconds - before.get(name, 0.0) for name, seconds in cpu_seconds(server).items()}
    seconds = max(each.responses[-1] for each in served)
    num_responses = sum(len(each.responses) for each in served)
    figures = {
        "output tokens": (round(sum(each.num_tokens for each in served) / seconds), "tokens/s"),
        "responses": (round(num_responses / seconds), "responses/s"),
        "TTFT, median": (round(median(each.milliseconds("ttft")[0] for each in served), 1), "ms"),
        "ITL, P99": (round(at(sorted(ms for each in served for ms in each.milliseconds("itl")), 99), 1), "ms"),
        "TPOT, median": (round(median(each.milliseconds("tpot")[0] for each in served), 2), "ms"),
        **{
            f"CPU time of {name}, for a response": (round(1e6 * each / num_responses), "us")
            for name, each in sorted(taken.items())
        },
    }
    for name, (value, unit) in figures.items():
        yield {"name": f"{count} in flight: {name}", "value": value, "unit": unit}


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
