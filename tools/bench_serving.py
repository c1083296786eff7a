"""Load on a running server, and what its clients see: throughput, TTFT, TPOT, ITL, goodput.

    python -m tools.bench_serving --num-prompts 200 --input-len 512 --output-len 128 --max-concurrency 32
    python -m tools.bench_serving --trace lengths.csv --request-rate 4 --goodput ttft:500 --goodput tpot:50

Requests come from NVIDIA's perf_analyzer, a stream of gRPC each, to the model `ensemble`: random text of so many
tokens, for exactly so many tokens of output. TTFT: from the request to its first response; TPOT: from there to the
last, by the tokens after the first; ITL: between two responses. Goodput: requests per second that meet all targets.
"""

import csv
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

from typer import Option

from ensemble.errors import ConfigError, DistServeError
from ensemble.tokenizer import Tokenizer
from tools.command_line import run
from tools.default_model import ensure_default_model
from tools.model_source import resolve_model
from tools.perf_analyzer import ensure_perf_analyzer
from tools.results import report

TRACE_COLUMNS = "ContextTokens", "GeneratedTokens"  # those of the Azure LLM inference traces
METRICS = ("ttft", "tpot", "itl", "e2e")
TIMEOUT_S = 3600.0
Row = dict[str, Any]


class LoadError(DistServeError):
    """perf_analyzer could not put the load on the server."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a request, in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Served:
    """A request as its client saw it, in seconds since the first was sent."""

    sent: float
    responses: list[float]
    num_tokens: int

    def milliseconds(self, metric: str) -> list[float]:
        """One value, or none or many of ITL; no TPOT of one token."""
        first, last = self.responses[0], self.responses[-1]
        seconds = {
            "ttft": [first - self.sent],
            "tpot": [(last - first) / (self.num_tokens - 1)] if self.num_tokens > 1 else [],
            "itl": [after - before for before, after in zip(self.responses, self.responses[1:], strict=False)],
            "e2e": [last - self.sent],
        }
        return [1e3 * each for each in seconds[metric]]


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
        with path.open(newline="") as file:
            return [Lengths(*(max(1, int(row[column])) for column in TRACE_COLUMNS)) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
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


def make_inputs(tokenizer: Tokenizer, lengths: list[Lengths], rng: random.Random) -> list[dict[str, Any]]:
    """perf_analyzer's input data, a request each."""
    pieces = one_token_pieces(tokenizer, rng)
    return [
        {
            "text_input": [random_text(tokenizer, pieces, each.prompt, rng)],
            "max_tokens": [each.output],
            "temperature": [0.0],
            "ignore_eos": [True],
            "stream": [True],
        }
        for each in lengths
    ]


def one_token_pieces(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    """ASCII texts that are one token each."""
    ids = rng.sample(range(tokenizer.vocab_size), min(4096, tokenizer.vocab_size))
    texts = {token_id: tokenizer.decode([token_id]) for token_id in ids}
    return [
        text
        for token_id, text in texts.items()
        if text.isascii() and text.isprintable() and tokenizer.encode(text, add_special_tokens=False) == [token_id]
    ] or ["a"]


def random_text(tokenizer: Tokenizer, pieces: list[str], num_tokens: int, rng: random.Random) -> str:
    """Text of that many tokens, BOS included; pieces may make other tokens together, so some are cut off or added."""
    text = rng.choice(pieces)
    for _ in range(20):
        missing = num_tokens - len(tokenizer.encode(text))
        if missing > 0:
            text += "".join(rng.choices(pieces, k=missing))
        elif missing < 0:
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:missing]) or pieces[0]
        else:
            break
    return text


def drive(url: str, inputs: list[dict[str, Any]], gaps_s: list[float] | None, max_concurrency: int) -> list[Served]:
    """Sends each request once: after gaps from one to the next, or so many at once. Raises LoadError."""
    program, environment = ensure_perf_analyzer()
    with tempfile.TemporaryDirectory() as folder:
        data, export, intervals = (Path(folder) / name for name in ("inputs.json", "export.json", "intervals"))
        data.write_text(json.dumps({"data": inputs}))
        load = ["--concurrency-range", str(max_concurrency)]
        if gaps_s:
            intervals.write_text("".join(f"{max(1, round(1e6 * gap))}\n" for gap in gaps_s))  # microseconds
            load = ["--request-intervals", str(intervals)]
        command = [str(program), "-m", "ensemble", "-u", url, "-i", "grpc", "--async", "--streaming", *load]
        command += ["--input-data", str(data), "--profile-export-file", str(export), "--max-threads", "16"]
        command += ["--request-count", str(len(inputs)), "--stability-percentage", "999"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        if result.returncode or not export.exists():
            said = (result.stderr or result.stdout).strip().splitlines()
            raise LoadError(f"perf_analyzer against {url}: {said[0] if said else result.returncode}")
        (experiment,) = json.loads(export.read_text())["experiments"]
    requests = experiment["requests"]
    start_ns = min(each["timestamp"] for each in requests)
    return [as_served(each, start_ns) for each in requests]


def as_served(request: dict[str, Any], start_ns: int) -> Served:
    """From perf_analyzer's export."""
    return Served(
        (request["timestamp"] - start_ns) / 1e9,
        [(each - start_ns) / 1e9 for each in request["response_timestamps"]],
        int(request["request_inputs"]["max_tokens"]),
    )


def rows(served: list[Served], num_input_tokens: int, targets: dict[str, float]) -> Iterable[Row]:
    seconds = max(each.responses[-1] for each in served)
    yield {"name": "requests served", "value": len(served), "unit": "requests"}
    yield {"name": "duration", "value": round(seconds, 2), "unit": "s"}
    yield {"name": "request throughput", "value": round(len(served) / seconds, 3), "unit": "requests/s"}
    yield {"name": "input tokens", "value": round(num_input_tokens / seconds, 1), "unit": "tokens/s"}
    num_tokens = sum(each.num_tokens for each in served)
    yield {"name": "output tokens", "value": round(num_tokens / seconds, 1), "unit": "tokens/s"}
    for metric in METRICS:
        values = sorted(value for each in served for value in each.milliseconds(metric))
        if values:
            statistics = {"mean": mean(values), "median": median(values), "P90": at(values, 90), "P99": at(values, 99)}
            for name, value in statistics.items():
                yield {"name": f"{metric.upper()}, {name}", "value": round(value, 2), "unit": "ms"}
    if targets:
        num_met = sum(all(max(each.milliseconds(m), default=0) <= ms for m, ms in targets.items()) for each in served)
        wanted = " and ".join(f"{metric.upper()} <= {ms:g} ms" for metric, ms in targets.items())
        yield {"name": f"SLO attainment, {wanted}", "value": round(num_met / len(served), 4), "unit": "of the requests"}
        yield {"name": f"goodput, {wanted}", "value": round(num_met / seconds, 3), "unit": "requests/s"}


def at(values: list[float], percent: int) -> float:
    """The percentile of sorted values: the smallest with at least so many per cent of them at or below it."""
    return values[-(-len(values) * percent // 100) - 1]


if __name__ == "__main__":
    run(main)
