"""Load on a running server, and what its clients see: throughput, TTFT, TPOT, ITL, goodput.

    python -m tools.bench_serving --num-prompts 200 --input-len 512 --output-len 128 --max-concurrency 32
    python -m tools.bench_serving --trace lengths.csv --request-rate 4 --goodput ttft:500 --goodput tpot:50

Requests come from NVIDIA's perf_analyzer, a stream of gRPC each, to the model `ensemble`: random text of so many
tokens, for exactly so many tokens of output. TTFT: from the request to its first response; TPOT: from there to the
last, by the tokens after it; ITL: between two responses, which hold several tokens where the server is behind.
Goodput: requests per second that meet all targets.
"""

import csv
import random
import re
from pathlib import Path
from typing import Annotated

from typer import Option

from ensemble.errors import ConfigError
from ensemble.tokenizer import Tokenizer
from tools.benchmarks.results import report
from tools.benchmarks.serving_load import Lengths, drive, make_inputs, rows
from tools.command_line import run
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model

TRACE_COLUMNS = "ContextTokens", "GeneratedTokens"  # those of the Azure LLM inference traces


def main(
    url: Annotated[str, Option(help="of the gRPC service")] = "localhost:8001",
    model: Annotated[str | None, Option(help="directory or Hub name, for its tokenizer. Default: make serve's")] = None,
    num_prompts: Annotated[int, Option(min=1)] = 100,
    input_len: Annotated[int, Option(min=1, help="tokens of a prompt")] = 512,
    output_len: Annotated[int, Option(min=1, help="tokens of output")] = 128,
    range_ratio: Annotated[float, Option(min=0, max=1, help="lengths are drawn from +- this part of them")] = 0.0,
    trace: Annotated[Path | None, Option(help=f"CSV with {' and '.join(TRACE_COLUMNS)}: lengths from its rows")] = None,
    max_concurrency: Annotated[int, Option(min=1, help="requests in flight; without --request-rate")] = 1,
    request_rate: Annotated[
        float | None, Option(min=0.001, help="a second, Poisson; without --max-concurrency")
    ] = None,
    goodput: Annotated[
        list[str] | None, Option(help="METRIC:MS with ttft, tpot or e2e, to be met by a request")
    ] = None,
    seed: int = 0,
    output: Annotated[Path | None, Option(help="JSON file for the results")] = None,
) -> None:
    rng = random.Random(seed)
    lengths = read_trace(trace) if trace else [Lengths(input_len, output_len)] * num_prompts
    lengths = [draw(each, range_ratio, rng) for each in lengths[:num_prompts]]
    targets = parse_targets(goodput or [])
    tokenizer = Tokenizer.from_dir(resolve_model(model) if model else ensure_default_model())
    gaps_s = [rng.expovariate(request_rate) for _ in lengths] if request_rate else None
    served = drive(url, make_inputs(tokenizer, lengths, rng), gaps_s, max_concurrency)
    report(list(rows(served, sum(each.prompt for each in lengths), targets)), output)


def read_trace(path: Path) -> list[Lengths]:
    """Raises ConfigError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Lengths(*(max(1, int(row[column])) for column in TRACE_COLUMNS)) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"--trace {path}: needs the columns {' and '.join(TRACE_COLUMNS)}: {error!r}") from None


def parse_targets(goodput: list[str]) -> dict[str, float]:
    """Metric |-> milliseconds. Raises ConfigError."""
    for each in goodput:
        if not re.fullmatch(r"(ttft|tpot|e2e):\d+(\.\d+)?", each):
            raise ConfigError(f"--goodput {each}: must be ttft, tpot or e2e, a colon, and milliseconds")
    return {metric: float(target) for metric, target in (each.split(":") for each in goodput)}


def draw(lengths: Lengths, range_ratio: float, rng: random.Random) -> Lengths:
    def near(length: int) -> int:
        return rng.randint(max(1, round(length * (1 - range_ratio))), max(1, round(length * (1 + range_ratio))))

    return Lengths(near(lengths.prompt), near(lengths.output))


if __name__ == "__main__":
    run(main)
