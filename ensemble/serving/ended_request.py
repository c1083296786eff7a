"""What one request that has ended adds to the metrics."""

from dataclasses import dataclass

from ensemble.errors import ErrorCode
from ensemble.request import FinishReason, SamplingParams
from ensemble.router.gauges import Labels
from ensemble.router.lives import Timeline
from ensemble.serving.client_request import NO_TARGETS, Targets
from ensemble.serving.metric_families import TPOT, TTFT


@dataclass(frozen=True, slots=True)
class Ended:
    """A request at its end, as far as operators are concerned."""

    timeline: Timeline
    num_prompt_tokens: int
    num_output_tokens: int
    outcome: FinishReason | ErrorCode
    is_error: bool
    targets: Targets = NO_TARGETS
    client_id: str = ""  # the request's id, as its client named it
    trace_parent: str = ""  # as its client sent it
    sampling: SamplingParams | None = None  # None: it was refused


def counted(ended: Ended) -> dict[tuple[str, Labels], float]:
    """What one ended request adds to the counters."""
    totals: dict[tuple[str, Labels], float] = {}
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
    values, targets = observed(ended), ended.targets
    limits = {TTFT: targets.ttft_s, TPOT: targets.tpot_s}
    too_many_late_gaps = 100 * ended.timeline.num_late_gaps > ended.timeline.num_gaps
    if ended.is_error or (targets.itl_s is not None and too_many_late_gaps):
        return False
    return all(limit is None or values.get(name, 0.0) <= limit for name, limit in limits.items())


def observed(ended: Ended) -> dict[str, float]:
    """What one ended request adds to the histograms: only spans that it has passed."""
    timeline = ended.timeline
    spans = {
        "vllm:request_queue_time_seconds": (timeline.arrival_ns, timeline.first_scheduled_ns),
        "vllm:request_prefill_time_seconds": (timeline.first_scheduled_ns, timeline.first_token_ns),
        "vllm:request_decode_time_seconds": (timeline.first_token_ns, timeline.last_token_ns),
        "vllm:request_inference_time_seconds": (timeline.first_scheduled_ns, timeline.last_token_ns),
        TTFT: (timeline.arrival_ns, timeline.first_sent_ns),
        "distserve:bridge_time_seconds": (timeline.first_token_ns, timeline.decode_submitted_ns),
        "vllm:e2e_request_latency_seconds": (timeline.arrival_ns, timeline.last_sent_ns),
    }
    values = {name: (end - start) / 1e9 for name, (start, end) in spans.items() if start and end}
    if timeline.predicted_first_token_ns and timeline.first_sent_ns:
        error_s = abs(timeline.predicted_first_token_ns - timeline.first_sent_ns) / 1e9
        values["distserve:ttft_prediction_error"] = error_s / max(1e-9, values[TTFT])
    if timeline.last_sent_ns and ended.num_output_tokens > 1:
        span = (timeline.last_sent_ns - timeline.first_sent_ns) / 1e9
        if timeline.first_sent_ns == timeline.last_sent_ns:  # one response: its client sees no time between tokens
            span = (timeline.last_token_ns - timeline.first_token_ns) / 1e9
        values[TPOT] = span / (ended.num_output_tokens - 1)
    if ended.num_output_tokens:
        values["vllm:request_prompt_tokens"] = ended.num_prompt_tokens
        values["vllm:request_generation_tokens"] = ended.num_output_tokens
    return values
