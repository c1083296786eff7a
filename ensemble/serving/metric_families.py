"""Which metrics there are, under the field's names.

vllm:        what vLLM has, with its name and its meaning
distserve:   what it has not

Each family has its samples from the start, so that a rate is never of a metric that is not there yet.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ensemble.config import Role
from ensemble.errors import ErrorCode
from ensemble.router.fleet import State
from ensemble.router.gauges import Labels
from ensemble.router.prefix_moves import FetchResult

# vLLM's bounds, and finer ones below where ours begin.
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_SHORT_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
_TOKEN_S = (*_SHORT_S, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_PHASE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, *_REQUEST_S)
_COPY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

Kind = Literal["counter", "gauge", "histogram"]
TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
ITL = "vllm:inter_token_latency_seconds"


def _by(name: str, *values: str) -> tuple[Labels, ...]:
    return tuple(((name, value),) for value in values)


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with all its samples."""

    kind: Kind
    description: str
    labels: tuple[Labels, ...] = ((),)  # there from the start
    bounds: tuple[float, ...] = ()  # of a histogram's buckets


_OF_REPLICAS: tuple[Labels, ...] = ()  # each has them from when it is known
_TRANSPORTS = _by("transport", "cuda_ipc", "host", "nccl")
_ROLES = tuple((("role", role), ("state", state)) for role in get_args(Role) for state in get_args(State))

FAMILIES: dict[str, Family] = {
    "vllm:num_requests_running": Family("gauge", "Requests in prefill, bridge and decode"),
    "vllm:num_requests_waiting": Family("gauge", "Requests in the prefill queue"),
    "vllm:num_requests_swapped": Family("gauge", "Requests whose KV is in a decode replica's host pool, or on the way"),
    "vllm:kv_cache_usage_perc": Family("gauge", "Share of a replica's KV blocks in use, from 0 to 1", _OF_REPLICAS),
    "vllm:prompt_tokens_total": Family("counter", "Prompt tokens of requests that have ended"),
    "vllm:generation_tokens_total": Family("counter", "Tokens generated for clients"),
    "vllm:request_success_total": Family(
        "counter",
        "Requests that ended with their last token, by reason",
        _by("finished_reason", "stop", "length"),
    ),
    "vllm:prefix_cache_queries_total": Family("counter", "Prompt tokens looked up in the replicas' prefix caches"),
    "vllm:prefix_cache_hits_total": Family("counter", "Prompt tokens found there, and not computed again"),
    "distserve:prefix_fetches_total": Family(
        "counter",
        "Prompts that waited for a prefix that another replica had cached, by what came of it",
        _by("result", *get_args(FetchResult)),
    ),
    "vllm:num_preemptions_total": Family("counter", "Sequences that made room for others in the midst of decode"),
    TTFT: Family("histogram", "Arrival at the front to the hand-over of the first response", bounds=_TTFT_S),
    ITL: Family("histogram", "Between two tokens of a request, as they reach the front", bounds=_TOKEN_S),
    TPOT: Family("histogram", "Mean time between output tokens of a request, at the hand-over", bounds=_TOKEN_S),
    "vllm:e2e_request_latency_seconds": Family(
        "histogram", "Arrival at the front to the hand-over of the last response", bounds=_REQUEST_S
    ),
    "vllm:request_queue_time_seconds": Family("histogram", "Arrival to first prefill batch", bounds=_PHASE_S),
    "vllm:request_prefill_time_seconds": Family("histogram", "First batch to first token", bounds=_PHASE_S),
    "vllm:request_decode_time_seconds": Family("histogram", "First to last token, hand-off included", bounds=_PHASE_S),
    "vllm:request_inference_time_seconds": Family("histogram", "First batch to last token", bounds=_PHASE_S),
    "vllm:request_prompt_tokens": Family("histogram", "Prompt tokens of a request", bounds=_LENGTHS),
    "vllm:request_generation_tokens": Family("histogram", "Output tokens of a request", bounds=_LENGTHS),
    "distserve:bridge_time_seconds": Family(
        "histogram", "First token to submission to a decode replica", bounds=_PHASE_S
    ),
    "distserve:kv_transfer_time_seconds": Family(
        "histogram", "The copy of a sequence's KV to the replica where it decodes", _TRANSPORTS, _COPY_S
    ),
    "distserve:kv_transfer_wait_seconds": Family(
        "histogram", "A sequence's arrival at that replica to its last byte, less the copy", _TRANSPORTS, _PHASE_S
    ),
    "distserve:kv_transfer_bytes_total": Family("counter", "KV copied so", _TRANSPORTS),
    "distserve:swap_time_seconds": Family(
        "histogram",
        "A copy of a sequence's KV to a host pool or back, by direction",
        _by("direction", "out", "in"),
        _COPY_S,
    ),
    "distserve:swap_bytes_total": Family(
        "counter", "KV moved between device and host pools, by direction", _by("direction", "out", "in")
    ),
    "distserve:preemptions_total": Family(
        "counter",
        "Sequences that made room for others, by what became of them: swap to the host pool, or recompute",
        _by("by", "swap", "recompute"),
    ),
    "distserve:recoveries_total": Family(
        "counter",
        "Requests computed again from what their clients had: death of a replica, drain, unreachable, transfer",
        _by("cause", "death", "drain", "unreachable", "transfer"),
    ),
    "distserve:moves_total": Family(
        "counter",
        "Running sequences handed off with their KV: because of a drain, or to balance two replicas",
        _by("cause", "drain", "balance"),
    ),
    "distserve:request_errors_total": Family(
        "counter", "Requests that ended with an error, by code", _by("code", *get_args(ErrorCode))
    ),
    "distserve:deadline_exceeded_total": Family("counter", "Requests that were ended by their own timeout"),
    "distserve:slo_requests_total": Family(
        "counter",
        "Requests that named TTFT, ITL or TPOT targets, by whether all were met",
        _by("attained", "true", "false"),
    ),
    "distserve:requests_without_spans_total": Family("counter", "Requests whose spans could not be exported"),
    "distserve:role_changes_total": Family(
        "counter", "Replicas that changed sides because of the load, by their new role", _by("to", "prefill", "decode")
    ),
    "distserve:ttft_prediction_error": Family(
        "histogram",
        "Relative error of the time to the first token, as predicted when its prompt was started",
        bounds=_ERRORS,
    ),
    "distserve:num_requests_bridge": Family("gauge", "Prefilled requests that wait for a decode replica"),
    "distserve:num_tokens_waiting": Family("gauge", "Prompt tokens in the prefill queue"),
    "distserve:replicas": Family("gauge", "Replicas by role and state", _ROLES),
    "distserve:replica_up": Family("gauge", "1 while the replica serves", _OF_REPLICAS),
    "distserve:replica_requests": Family("gauge", "Requests that a replica has something of", _OF_REPLICAS),
    "distserve:step_prediction_error": Family(
        "gauge", "Relative error of a replica's step times, as predicted: lately", _OF_REPLICAS
    ),
    "distserve:kv_blocks": Family("gauge", "Blocks of a replica's KV pool", _OF_REPLICAS),
    "distserve:kv_blocks_free": Family("gauge", "Free blocks of it, as the replica reported last", _OF_REPLICAS),
    "distserve:host_kv_blocks": Family("gauge", "Blocks of a replica's host pool", _OF_REPLICAS),
    "distserve:host_kv_blocks_free": Family("gauge", "Free blocks of it, as the replica reported last", _OF_REPLICAS),
    "distserve:prefix_cache_blocks": Family("gauge", "Blocks in a replica's prefix cache", _OF_REPLICAS),
}
