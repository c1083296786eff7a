"""The figures of a run, under the names and in the form that `vllm bench serve` has."""

from collections.abc import Iterator
from statistics import mean, median, pstdev
from typing import Any

import numpy as np

from tools.load.records import Record, Run, describe

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "gap": "Longest Gap of a Request",
    "e2el": "End-to-end Latency",
}
LABELS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "gap": "longest gap", "e2el": "E2EL"}
WIDTH = 50


def values_ms(records: list[Record], metric: str) -> list[float]:
    """One of each request; of ITL every gap between responses, of TPOT none where there was one response."""
    if metric == "itl":
        return [1e3 * gap for each in records for gap in each.gaps]
    if metric == "tpot":
        return [1e3 * each.tpot for each in records if each.tpot is not None]
    if metric == "gap":
        return [1e3 * each.longest_gap for each in records if each.gaps]
    return [1e3 * each.value(metric) for each in records]


def summarize(
    run: Run, targets_ms: dict[str, float], metrics: tuple[str, ...], percentiles: tuple[float, ...]
) -> dict[str, Any]:
    """Name |-> figure. Of requests that failed only their number counts, and that they meet no target."""
    done, seconds = run.completed, max(run.duration, 1e-9)
    num_input_tokens, num_output_tokens = sum(each.prompt_len for each in done), sum(each.num_tokens for each in done)
    figures: dict[str, Any] = {
        "valid": run.is_valid,
        "duration": seconds,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "total_input_tokens": num_input_tokens,
        "total_output_tokens": num_output_tokens,
        "request_throughput": len(done) / seconds,
        "request_goodput": None,
        "output_throughput": num_output_tokens / seconds,
        "total_token_throughput": (num_input_tokens + num_output_tokens) / seconds,
        "client_lag_p99_ms": run.lag_p99_ms,
        "client_cpu_share": run.client_cpu_share,
    }
    if targets_ms:
        figures["request_goodput"] = sum(each.meets(targets_ms) for each in done) / seconds
        figures["slo_attainment"] = run.attainment(targets_ms)
    for metric in metrics:
        values = values_ms(done, metric)
        if values:
            figures |= {f"mean_{metric}_ms": mean(values), f"median_{metric}_ms": median(values)}
            figures |= {f"std_{metric}_ms": pstdev(values)}
            figures |= {f"p{percent:g}_{metric}_ms": float(np.percentile(values, percent)) for percent in percentiles}
    return figures


def detail(run: Run) -> dict[str, Any]:
    """Of every request, in the order of their arrivals; seconds."""
    return {
        "input_lens": [each.prompt_len for each in run.records],
        "output_lens": [each.num_tokens for each in run.records],
        "start_times": [each.sent for each in run.records],
        "ttfts": [each.ttft if each.times else None for each in run.records],
        "itls": [each.gaps for each in run.records],
        "longest_gaps": [each.longest_gap for each in run.records],
        "generated_texts": [each.text for each in run.records],
        "errors": [each.error for each in run.records],
    }


def lines(figures: dict[str, Any], run: Run, targets_ms: dict[str, float], metrics: tuple[str, ...]) -> Iterator[str]:
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    yield _line("Successful requests:", figures["completed"])
    yield _line("Failed requests:", figures["failed"])
    yield _line("Benchmark duration (s):", figures["duration"])
    yield _line("Total input tokens:", figures["total_input_tokens"])
    yield _line("Total generated tokens:", figures["total_output_tokens"])
    yield _line("Request throughput (req/s):", figures["request_throughput"])
    if targets_ms:
        yield _line("Request goodput (req/s):", figures["request_goodput"])
        yield _line("SLO attainment:", f"{figures['slo_attainment']:.4f}")
        yield f"  ({describe(targets_ms)})"
    yield _line("Output token throughput (tok/s):", figures["output_throughput"])
    yield _line("Total token throughput (tok/s):", figures["total_token_throughput"])
    for metric in metrics:
        if f"mean_{metric}_ms" not in figures:
            continue
        yield f"{TITLES[metric]:-^{WIDTH}}"
        yield _line(f"Mean {LABELS[metric]} (ms):", figures[f"mean_{metric}_ms"])
        yield _line(f"Median {LABELS[metric]} (ms):", figures[f"median_{metric}_ms"])
        for name in figures:
            if name.startswith("p") and name.endswith(f"_{metric}_ms"):
                yield _line(f"{name.split('_')[0].upper()} {LABELS[metric]} (ms):", figures[name])
    yield f"{'Client':-^{WIDTH}}"
    yield _line("Client lag P99 (ms):", figures["client_lag_p99_ms"])
    yield _line("Client CPU share:", figures["client_cpu_share"])
    yield "=" * WIDTH
    error = next((each.error for each in run.records if each.error), None)
    if error is not None:
        yield f"First error: {error}"
    if not run.is_valid:
        yield f"INVALID: {why_invalid(run)}"


def why_invalid(run: Run) -> str:
    return (
        f"the client itself was late by {run.lag_p99_ms:.1f} ms at P99, more than --max-lag-ms {run.max_lag_ms:g}: "
        "the figures are not the server's"
    )


def _line(label: str, value: float | int | str) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {shown:<10}".rstrip()
