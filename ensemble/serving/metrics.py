"""Counters, gauges and histograms on the Triton server's metrics port, under the field's names.

Each update is a round trip to the server, so all of them come from one thread: what has ended is queued for it, what is
the case now it asks for on a timer.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ensemble.errors import ErrorCode
from ensemble.request import FinishReason
from ensemble.router.lives import Timeline
from ensemble.router.router import Gauges, Labels
from ensemble.serving.inputs import NO_TARGETS, Targets
from ensemble.threads import start_vital_thread

INTERVAL_S = 0.25
_REQUEST_S = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60]
_TTFT_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
_TPOT_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
_WAIT_S = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_ERROR = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5]

Kind = Literal["counter", "gauge", "histogram"]
MakeFamily = Callable[[str, str, Kind], Any]  # name, description, kind -> a family of the Triton server's metrics API

METRIC_DESCRIPTIONS: dict[str, tuple[Kind, str]] = {
    "vllm:prompt_tokens_total": ("counter", "Prompt tokens of requests whose prefill has finished"),
    "vllm:generation_tokens_total": ("counter", "Tokens generated for clients"),
    "vllm:request_success_total": ("counter", "Requests that ended with their last token, by reason"),
    "distserve:request_errors_total": ("counter", "Requests that ended with an error, by code"),
    "distserve:slo_requests_total": (
        "counter",
        "Requests that named TTFT, ITL or TPOT targets, by whether all were met",
    ),
    "distserve:deadline_exceeded_total": ("counter", "Requests that were ended by their own timeout"),
    "vllm:time_to_first_token_seconds": ("histogram", "Arrival at the front to the hand-over of the first response"),
    "vllm:time_per_output_token_seconds": ("histogram", "Mean time between output tokens of a request"),
    "vllm:e2e_request_latency_seconds": ("histogram", "Arrival at the front to the hand-over of the last response"),
    "vllm:request_queue_time_seconds": ("histogram", "Arrival to first prefill batch"),
    "distserve:bridge_time_seconds": ("histogram", "First token to submission to a decode replica"),
    "distserve:kv_transfer_time_seconds": ("histogram", "The copy of a sequence's KV blocks"),
    "distserve:ttft_prediction_error": (
        "histogram",
        "Relative error of the time to the first token, as predicted when its prompt was started",
    ),
    "distserve:role_changes_total": ("counter", "Replicas that changed sides because of the load, by their new role"),
    "distserve:step_prediction_error": ("gauge", "Relative error of a replica's step times, as predicted: lately"),
    "vllm:num_requests_waiting": ("gauge", "Requests in the prefill queue"),
    "vllm:num_requests_running": ("gauge", "Requests in prefill, bridge and decode"),
    "vllm:num_requests_swapped": ("gauge", "Requests whose KV is in a decode replica's host pool, or on the way"),
    "distserve:recoveries_total": (
        "counter",
        "Requests computed again from what their clients had, by cause: death of a replica, drain, unreachable",
    ),
    "vllm:num_preemptions_total": ("counter", "Sequences that made room for others in the midst of decode"),
    "distserve:preemptions_total": (
        "counter",
        "The same, by what became of them: swap to the host pool, or recompute from their tokens",
    ),
    "distserve:swap_bytes_total": ("counter", "KV moved between device and host pools, by direction"),
    "vllm:prefix_cache_queries_total": (
        "counter",
        "Prompt tokens looked up in the prefix caches of the replicas that compute them",
    ),
    "vllm:prefix_cache_hits_total": ("counter", "Prompt tokens found there, and not computed again"),
    "distserve:num_requests_bridge": ("gauge", "Prefilled requests that wait for a decode replica"),
    "distserve:kv_blocks": ("gauge", "Blocks of a replica's KV pool"),
    "distserve:kv_blocks_free": ("gauge", "Free blocks of a replica's KV pool, as its worker reported last"),
    "distserve:replica_up": ("gauge", "1 while the replica's worker serves"),
}
_BUCKETS = {
    "vllm:time_to_first_token_seconds": _TTFT_S,
    "vllm:time_per_output_token_seconds": _TPOT_S,
    "vllm:e2e_request_latency_seconds": _REQUEST_S,
    "vllm:request_queue_time_seconds": _WAIT_S,
    "distserve:bridge_time_seconds": _WAIT_S,
    "distserve:kv_transfer_time_seconds": _WAIT_S,
    "distserve:ttft_prediction_error": _ERROR,
}


@dataclass(frozen=True, slots=True)
class Ended:
    """A request at its end, as far as the metrics are concerned."""

    timeline: Timeline
    num_prompt_tokens: int
    num_output_tokens: int
    outcome: FinishReason | ErrorCode
    is_error: bool
    targets: Targets = NO_TARGETS


class Metrics:
    """`count` may be called from any thread and does not wait."""

    def __init__(self, make_family: MakeFamily, read_gauges: Callable[[], Gauges]) -> None:
        self._families = {
            name: make_family(name, description, kind) for name, (kind, description) in METRIC_DESCRIPTIONS.items()
        }
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._counted: dict[tuple[str, Labels], float] = {}  # what the counters read from `read_gauges` stand at
        self._read_gauges = read_gauges
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = start_vital_thread(self._run, "metrics")

    def count(self, ended: Ended) -> None:
        self._ended.put(ended)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=2.0)
        self._metrics.clear()  # metrics go before their families
        self._families.clear()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            try:
                self._report()
            except Exception:
                if not self._closing.is_set():  # else the Triton server takes nothing any more
                    raise

    def _report(self) -> None:
        totals: Counter[tuple[str, Labels]] = Counter()
        deadline = time.monotonic() + INTERVAL_S
        while not self._ended.empty() and time.monotonic() < deadline:
            ended = self._ended.get()
            totals += counted(ended)
            for name, seconds in durations(ended).items():
                self._metric(name, ()).observe(seconds)
        for (name, labels), value in totals.items():
            self._metric(name, labels).increment(value)
        levels = self._read_gauges()
        for (name, labels), level in levels.items():
            if METRIC_DESCRIPTIONS[name][0] == "gauge":
                self._metric(name, labels).set(level)
            else:
                self._metric(name, labels).increment(level - self._counted.get((name, labels), 0))
                self._counted[name, labels] = level
        if levels:  # else the router was too busy to tell
            self._zero_others(levels)

    def _zero_others(self, levels: Gauges) -> None:
        """A replica that is no more has nothing. (Deleted gauges stay in the scrape.)"""
        for (name, labels), metric in self._metrics.items():
            if METRIC_DESCRIPTIONS[name][0] == "gauge" and (name, labels) not in levels:
                metric.set(0)

    def _metric(self, name: str, labels: Labels) -> Any:
        if (name, labels) not in self._metrics:
            all_labels = {"model": "scheduler", "version": "1", **dict(labels)}
            arguments = {"buckets": _BUCKETS[name]} if name in _BUCKETS else {}
            self._metrics[name, labels] = self._families[name].Metric(labels=all_labels, **arguments)
        return self._metrics[name, labels]


def counted(ended: Ended) -> Counter[tuple[str, Labels]]:
    """What one ended request adds to the counters."""
    totals: Counter[tuple[str, Labels]] = Counter()
    if ended.is_error:
        totals["distserve:request_errors_total", (("code", ended.outcome),)] = 1
    else:
        totals["vllm:request_success_total", (("finished_reason", ended.outcome),)] = 1
    if ended.num_output_tokens:
        totals["vllm:prompt_tokens_total", ()] = ended.num_prompt_tokens
        totals["vllm:generation_tokens_total", ()] = ended.num_output_tokens
    if ended.targets:
        totals["distserve:slo_requests_total", (("attained", str(attained(ended)).lower()),)] = 1
    return totals


def attained(ended: Ended) -> bool:
    """Whether a request met all its targets. A failed one did not."""
    spans, targets = durations(ended), ended.targets
    limits = {
        "vllm:time_to_first_token_seconds": targets.ttft_s,
        "vllm:time_per_output_token_seconds": targets.tpot_s,
    }
    too_many_late_gaps = 100 * ended.timeline.num_late_gaps > ended.timeline.num_gaps
    if ended.is_error or (targets.itl_s is not None and too_many_late_gaps):
        return False
    return all(limit is None or spans.get(name, 0.0) <= limit for name, limit in limits.items())


def durations(ended: Ended) -> dict[str, float]:
    """What one ended request adds to the histograms, seconds but for an error: only spans that it has passed."""
    timeline = ended.timeline
    spans = {
        "vllm:request_queue_time_seconds": (timeline.arrival_ns, timeline.first_scheduled_ns),
        "vllm:time_to_first_token_seconds": (timeline.arrival_ns, timeline.first_sent_ns),
        "distserve:bridge_time_seconds": (timeline.first_token_ns, timeline.decode_submitted_ns),
        "vllm:e2e_request_latency_seconds": (timeline.arrival_ns, timeline.last_sent_ns),
    }
    seconds = {name: (end - start) / 1e9 for name, (start, end) in spans.items() if end}
    if timeline.predicted_first_token_ns and timeline.first_sent_ns:
        error_s = abs(timeline.predicted_first_token_ns - timeline.first_sent_ns) / 1e9
        seconds["distserve:ttft_prediction_error"] = error_s / max(1e-9, seconds["vllm:time_to_first_token_seconds"])
    if timeline.decode_joined_ns:
        seconds["distserve:kv_transfer_time_seconds"] = timeline.kv_transfer_ns / 1e9
    if timeline.last_sent_ns and ended.num_output_tokens > 1:
        span = (timeline.last_sent_ns - timeline.first_sent_ns) / 1e9
        if timeline.first_sent_ns == timeline.last_sent_ns:  # one response: its client sees no time between tokens
            span = (timeline.last_token_ns - timeline.first_token_ns) / 1e9
        seconds["vllm:time_per_output_token_seconds"] = span / (ended.num_output_tokens - 1)
    return seconds
