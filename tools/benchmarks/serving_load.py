"""Requests to a running server by NVIDIA's perf_analyzer, a gRPC stream each, and what their client saw."""

import json
import random
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ensemble.errors import DistServeError
from ensemble.tokenizer import Tokenizer
from tools.perf_analyzer import ensure_perf_analyzer

METRICS = ("ttft", "tpot", "itl", "e2e")
TIMEOUT_S = 3600.0
DRAIN_US = 5_000_000  # after the last arrival
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
    num_first_tokens: int  # in the first response

    def milliseconds(self, metric: str) -> list[float]:
        """One value, or none or many of ITL; no TPOT of one response."""
        first, last = self.responses[0], self.responses[-1]
        num_later = self.num_tokens - self.num_first_tokens
        seconds = {
            "ttft": [first - self.sent],
            "tpot": [(last - first) / num_later] if num_later else [],
            "itl": [after - before for before, after in zip(self.responses, self.responses[1:], strict=False)],
            "e2e": [last - self.sent],
        }
        return [1e3 * each for each in seconds[metric]]


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
            "return_num_output_tokens": [True],
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
        data.write_text(json.dumps({"data": inputs}), encoding="utf-8")
        load = ["--concurrency-range", str(max_concurrency)]
        if gaps_s:
            # In microseconds, the first before the first request. perf_analyzer begins anew after the last, and looks
            # only each second whether there have been enough: a pause, in which the answers are awaited.
            gaps_us = [*(max(1, round(1e6 * gap)) for gap in gaps_s), DRAIN_US]
            intervals.write_text("".join(f"{gap}\n" for gap in gaps_us), encoding="utf-8")
            load = ["--request-intervals", str(intervals)]
        command = [str(program), "-m", "ensemble", "-u", url, "-i", "grpc", "--async", "--streaming", *load]
        command += ["--input-data", str(data), "--profile-export-file", str(export), "--max-threads", "16"]
        command += ["--request-count", str(len(inputs)), "--stability-percentage", "999"]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LoadError(f"perf_analyzer against {url}: not done after {TIMEOUT_S:.0f} s") from None
        if result.returncode or not export.exists():
            said = (result.stderr or result.stdout).strip().splitlines()
            raise LoadError(f"perf_analyzer against {url}: {said[0] if said else result.returncode}")
        (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    requests = sorted(experiment["requests"], key=lambda each: each["timestamp"])[: len(inputs)]
    if len(requests) < len(inputs):
        raise LoadError(f"perf_analyzer against {url}: {len(requests)} of {len(inputs)} requests were served")
    return [as_served(each, requests[0]["timestamp"]) for each in requests]


def as_served(request: dict[str, Any], start_ns: int) -> Served:
    """From perf_analyzer's export."""
    return Served(
        (request["timestamp"] - start_ns) / 1e9,
        [(each - start_ns) / 1e9 for each in request["response_timestamps"]],
        int(request["request_inputs"]["max_tokens"]),
        _number(request["response_outputs"][0]["num_output_tokens"]),
    )


def _number(exported: int | str) -> int:
    """Of an INT32, which perf_analyzer exports as the characters of its four bytes."""
    is_bytes = isinstance(exported, str) and len(exported) == 4
    return int.from_bytes(str(exported).encode("latin-1"), "little") if is_bytes else int(exported)


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
