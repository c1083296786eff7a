"""Load on a running server, and what its clients see: throughput, TTFT, TPOT, ITL, goodput.

    python -m tools.bench_serving --num-prompts 200 --input-len 512 --output-len 128 --request-rate 4
    python -m tools.bench_serving --dataset-name chat --request-rate 8 --goodput ttft:250 tpot:40 --result-dir results

Flags, names and output are those of `vllm bench serve` as far as both have them. The client is ours (tools/load): an
open loop of gRPC streams, in which requests leave by the schedule whatever the server does. TTFT counts from the
schedule; ITL is the gap between two responses, which hold several tokens where the server is behind, and the longest
gap of each request is told too. A run in which the client itself was late is invalid: it says so and exits with 1.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from typer import Argument, Option

from ensemble.config import model_name
from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from ensemble.tokenizer import Tokenizer
from tools.command_line import run
from tools.installation.cache import cache_dir
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.load import perf_analyzer
from tools.load.client_process import LoadError
from tools.load.load import MAX_LAG_MS, Load, put
from tools.load.prompts import one_token_pieces, random_text
from tools.load.records import METRICS, Run, parse_targets
from tools.load.summary import detail, lines, summarize, why_invalid
from tools.load.workloads import DATASETS, Workload, arrivals
from tools.serve import start
from tools.server.deployment import make_deployment
from tools.server.triton_server import TritonServer


def main(
    more_goodput: Annotated[list[str] | None, Argument(hidden=True)] = None,
    url: Annotated[str, Option(help="HOST:PORT of the gRPC service")] = "localhost:8001",
    serve: Annotated[bool, Option("--serve", help="start a server for the run, as make serve does")] = False,
    endpoint: Annotated[str, Option(help="ensemble: text; scheduler: token ids of exact lengths")] = "ensemble",
    model: Annotated[
        str | None,
        Option("--model", "--tokenizer", help="directory or Hub name. Default: make serve's"),
    ] = None,
    dataset_name: Annotated[str, Option(help=", ".join(DATASETS))] = "random",
    dataset_path: Annotated[Path | None, Option(help="of a trace: CSV or JSONL")] = None,
    num_prompts: Annotated[int, Option(min=1)] = 100,
    input_len: Annotated[int, Option("--input-len", "--random-input-len", min=1, help="tokens of a prompt")] = 512,
    output_len: Annotated[
        int | None, Option("--output-len", "--random-output-len", min=1, help="tokens of output; random: 128")
    ] = None,
    range_ratio: Annotated[
        float, Option("--range-ratio", "--random-range-ratio", min=0, max=1, help="lengths are +- this part of them")
    ] = 0.0,
    scale: Annotated[float, Option(min=0.001, help="of all lengths, for small models")] = 1.0,
    request_rate: Annotated[float, Option(min=0.001, help="a second; inf: all at once")] = float("inf"),
    burstiness: Annotated[float, Option(min=0.01, help="1: Poisson; less is burstier")] = 1.0,
    trace_speed: Annotated[float | None, Option(min=0.001, help="arrivals of the trace, so many times as fast")] = None,
    max_concurrency: Annotated[int | None, Option(min=1, help="requests in flight; the others wait")] = None,
    num_warmups: Annotated[int, Option(min=0, help="requests before the run")] = 1,
    goodput: Annotated[
        list[str] | None, Option(help=f"METRIC:MS ..., to be met by a request: {', '.join(METRICS)}")
    ] = None,
    percentile_metrics: Annotated[str, Option(help=f"of {', '.join(METRICS)}")] = "ttft,tpot,itl,gap,e2el",
    metric_percentiles: str = "90,99",
    result_dir: Annotated[Path | None, Option(help="keeps figures and records of every request here, as JSON")] = None,
    result_filename: Annotated[str | None, Option(help="in --result-dir; default: by rate, model and time")] = None,
    save_detailed: Annotated[bool, Option("--save-detailed", help="generated texts too")] = False,
    seed: int = 0,
    timeout: Annotated[float, Option(min=1, help="seconds, of a request")] = 600.0,
    processes: Annotated[int | None, Option(min=1, help="of the client; default: half the cores, at most 4")] = None,
    max_lag_ms: Annotated[float, Option(min=0, help="of the client, P99; beyond it the run is invalid")] = MAX_LAG_MS,
    client: Annotated[str, Option(help="ours, or perf_analyzer: NVIDIA's, against ensemble")] = "ours",
) -> None:
    targets_ms = parse_targets([*(goodput or []), *(more_goodput or [])])
    metrics = parse_metrics(percentile_metrics)
    percentiles = parse_percentiles(metric_percentiles)
    workload = Workload(dataset_name, dataset_path, input_len, output_len, range_ratio, scale)
    load = Load(workload, num_prompts, request_rate, burstiness, trace_speed, max_concurrency, endpoint, seed, timeout)
    if "://" in url:  # as of HTTP: gRPC would say that nobody is there
        raise ConfigError(f"--url {url}: must be HOST:PORT of the gRPC service, such as localhost:8001")
    if client not in ("ours", "perf_analyzer"):
        raise ConfigError(f"--client {client}: must be ours or perf_analyzer")
    path = resolve_model(model) if model else ensure_default_model()
    tokenizer = Tokenizer.from_dir(path)
    requests = load.requests(tokenizer, load_model_spec(path).max_model_len) if client == "ours" else []
    with own_server(path) if serve else contextlib.nullcontext(url) as at:
        if client == "perf_analyzer":
            found = by_perf_analyzer(at, load, tokenizer)
        else:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("Requests", total=len(requests))
                found = put(
                    at,
                    load,
                    requests,
                    num_processes=processes or default_processes(),
                    num_warmups=num_warmups,
                    max_lag_ms=max_lag_ms,
                    keep_text=save_detailed,
                    on_done=lambda number: progress.update(task, completed=number),
                )
    figures = summarize(found, targets_ms, metrics, percentiles)
    for line in lines(figures, found, targets_ms, metrics):
        print(line)
    if result_dir is not None:
        name = result_filename or f"{request_rate:g}qps-{model_name(path)}-{datetime.now():%Y%m%d-%H%M%S}.json"
        save(result_dir / name, found, {"model_id": model_name(path), "client": client} | figures)
    if not figures["completed"]:
        raise LoadError("no request was served")
    if not found.is_valid:
        raise LoadError(why_invalid(found))


@contextlib.contextmanager
def own_server(path: Path) -> Iterator[str]:
    """The gRPC address of a server that is ready, with `make serve`'s defaults but for its ports."""
    with TritonServer(make_deployment({"model.path": path}), log_path=cache_dir() / "server-bench.log") as server:
        start(server, Console(stderr=True, highlight=False))
        yield server.grpc_url


def default_processes() -> int:
    return max(1, min(4, (os.cpu_count() or 1) // 2))


def by_perf_analyzer(url: str, load: Load, tokenizer: Tokenizer) -> Run:
    """Raises ConfigError, LoadError."""
    if load.endpoint != "ensemble" or load.trace_speed is not None:
        raise ConfigError("--client perf_analyzer: goes with --endpoint ensemble and without --trace-speed")
    rng = random.Random(load.seed)
    asked = load.workload.draw(load.num_prompts, rng)
    is_open = load.rate != float("inf")
    due = arrivals(len(asked), load.rate, load.burstiness, rng) if is_open else []
    pieces = one_token_pieces(tokenizer, rng)
    texts = [each.text or random_text(tokenizer, pieces, each.lengths.prompt, rng) for each in asked]
    inputs = [perf_analyzer.text_inputs(text, each.lengths.output) for text, each in zip(texts, asked, strict=True)]
    gaps_s = [after - before for before, after in zip([0.0, *due], due, strict=False)] if is_open else None
    records = perf_analyzer.drive(url, inputs, gaps_s, load.max_concurrency or len(inputs))
    num_input_tokens = [len(tokenizer.encode(text)) for text in texts]
    records = [
        msgspec.structs.replace(record, prompt_len=length)
        for record, length in zip(records, num_input_tokens, strict=True)
    ]
    return Run(load=load.describe(), lag_p99_ms=0.0, max_lag_ms=MAX_LAG_MS, client_cpu_share=0.0, records=records)


def save(path: Path, found: Run, figures: dict[str, Any]) -> None:
    """The figures under vLLM's names, what was asked, and the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y%m%d-%H%M%S")
    content = {"date": date, **found.load, **figures, **detail(found), "records": found.records}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    print(f"Records: {path}")


def parse_metrics(text: str) -> tuple[str, ...]:
    """Raises ConfigError."""
    metrics = tuple(filter(None, text.split(",")))
    for each in metrics:
        if each not in METRICS:
            raise ConfigError(f"--percentile-metrics {each}: must be of {', '.join(METRICS)}")
    return metrics


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Raises ConfigError."""
    try:
        percentiles = tuple(float(each) for each in text.split(",") if each)
    except ValueError:
        raise ConfigError(f"--metric-percentiles {text}: numbers, such as 90,99, are needed") from None
    if not all(0 <= each <= 100 for each in percentiles):
        raise ConfigError(f"--metric-percentiles {text}: must be from 0 to 100")
    return percentiles


if __name__ == "__main__":
    run(main)
