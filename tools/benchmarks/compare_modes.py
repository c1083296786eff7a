"""The same load on both modes of LLaMA-2-7B's shape, on two GPUs: a prefill and a decode worker, or two colocated ones.

    python -m tools.benchmarks.compare_modes --output docs/results/serving.json

Dummy weights, fp16; prompts of 512 tokens, 128 of output. So many requests in flight, then Poisson arrivals.
"""

import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ensemble.config import GPU_BLOCK_SIZE, Deployment
from ensemble.tokenizer import Tokenizer
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.results import write_results
from tools.benchmarks.serving_load import Lengths, Row, drive, make_inputs, rows
from tools.proofs.gpu_smoke import write_model_dir
from tools.server.triton_server import TritonServer

MODEL = "LLaMA-2-7B"
PROMPT_LEN, OUTPUT_LEN = 512, 128
CONCURRENCIES = (1, 32, 128, 256)
RATES = (4.0, 8.0, 16.0, 24.0)  # requests a second
SECONDS = 10.0  # of arrivals
TARGETS = {"ttft": 200.0, "tpot": 25.0}
SHOWN = ("request throughput", "output tokens", "TTFT, median", "TTFT, P99", "TPOT, median", "TPOT, P99", "ITL, P99")


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="disaggregated, colocated. Default: both.")] = None,
    num_gpus: int = 2,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the servers' logs here")] = None,
) -> None:
    console = Console(width=150, highlight=False)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model_dir(path, SHAPES[MODEL].config)
        for each in mode or ("disaggregated", "colocated"):
            log = (log_dir or Path(folder)) / f"{each}.log"
            with TritonServer(deployment(path, each, num_gpus), log_path=log) as server:
                server.wait_ready(timeout_s=300)
                for row in loads(server.grpc_url, Tokenizer.from_dir(path)):
                    results.append(row | {"name": f"{each}, {row['name']}"})
                    console.print(f"{results[-1]['name']:80} {row['value']} {row['unit']}")
            if output is not None:
                write_results(output, results)


def deployment(path: Path, mode: str, num_gpus: int) -> Deployment:
    devices = [f"cuda:{index}" for index in range(num_gpus)]
    share = 0.9 if mode == "colocated" or num_gpus > 1 else 0.45
    stage = {"gpu_memory_utilization": share, "max_num_seqs": max(CONCURRENCIES)}
    split = (
        {"prefill": [], "decode": devices} if mode == "colocated" else {"prefill": devices[:1], "decode": devices[-1:]}
    )
    return Deployment.parse(
        {
            "mode": mode,
            "model": {"path": path, "dtype": "float16", "load_format": "dummy"},
            **{name: stage | {"devices": each} for name, each in split.items()},
            "block_size": GPU_BLOCK_SIZE,
        }
    )


def loads(url: str, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    drive(url, make_inputs(tokenizer, [Lengths(PROMPT_LEN, 8)] * 16, rng), None, 16)  # connects, and is thrown away
    for concurrency in CONCURRENCIES:
        lengths = [Lengths(PROMPT_LEN, OUTPUT_LEN)] * max(8, 2 * concurrency)
        served = drive(url, make_inputs(tokenizer, lengths, rng), None, concurrency)
        yield from shown(f"{concurrency} in flight", rows(served, PROMPT_LEN * len(lengths), {}))
    for rate in RATES:
        lengths = [Lengths(PROMPT_LEN, OUTPUT_LEN)] * round(rate * SECONDS)
        gaps_s = [rng.expovariate(rate) for _ in lengths]
        served = drive(url, make_inputs(tokenizer, lengths, rng), gaps_s, 1)
        yield from shown(f"{rate:g} requests a second", rows(served, PROMPT_LEN * len(lengths), TARGETS))


def shown(load: str, all_rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    for row in all_rows:
        if row["name"] in SHOWN or row["name"].startswith(("SLO", "goodput")):
            yield row | {"name": f"{load}: {row['name']}"}


if __name__ == "__main__":
    typer.run(main)
