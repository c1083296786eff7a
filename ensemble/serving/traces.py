"""Spans of each request for an OpenTelemetry collector (OTLP, protobuf over HTTP).

    llm_request      arrival at the front to the hand-over of the last response; a child of the client's span
      queue          until its first batch
      prefill        until its first token
      bridge         until a decode replica had room         (the two only where it was handed off)
      transfer       until its KV was there
      decode         until its last token

They are made when the request has ended, from its timeline, on a thread of their own: no request waits for them.
"""

import queue
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ensemble.operator_log import log_exception
from ensemble.router.lives import Timeline
from ensemble.serving.ended_request import Ended, observed
from ensemble.serving.marks import TRACE_PARENT
from ensemble.threads import start_vital_thread

MAX_QUEUED = 4096  # requests; those that come when so many wait have no spans
MAX_BATCH = 128  # requests whose spans leave together
LINGER_S = 1.0  # for which a batch gathers
EXPORT_S = 5.0  # for a batch, repetitions included
CLOSE_S = 1.0
TRACES_PATH = "/v1/traces"  # where a collector takes spans

# vLLM's names for what it has too.
_LATENCIES = {
    "gen_ai.latency.time_in_queue": "vllm:request_queue_time_seconds",
    "gen_ai.latency.time_to_first_token": "vllm:time_to_first_token_seconds",
    "gen_ai.latency.e2e": "vllm:e2e_request_latency_seconds",
    "gen_ai.latency.time_in_model_prefill": "vllm:request_prefill_time_seconds",
    "gen_ai.latency.time_in_model_decode": "vllm:request_decode_time_seconds",
    "gen_ai.latency.time_in_model_inference": "vllm:request_inference_time_seconds",
}


class Traces:
    """`record` may be called from any thread and does not wait."""

    def __init__(self, endpoint: str, model_name: str, on_dropped: Callable[[int], None]) -> None:
        """endpoint: a collector's URL, to which /v1/traces is added where it has no path. on_dropped is told how many
        requests will have no spans."""
        self._spans = _Spans(model_name)
        self._exporter = OTLPSpanExporter(spans_url(endpoint), timeout=EXPORT_S)
        self._on_dropped = on_dropped
        self._ended: queue.Queue[tuple[Ended, int] | None] = queue.Queue(MAX_QUEUED)
        self._thread = start_vital_thread(self._run, "traces")

    def record(self, ended: Ended) -> None:
        try:
            self._ended.put_nowait((ended, time.time_ns()))
        except queue.Full:
            self._on_dropped(1)

    def close(self) -> None:
        """Exports what is there, if that takes no longer than a second."""
        try:
            self._ended.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            batch = [self._ended.get()]
            deadline = time.monotonic() + LINGER_S
            while batch[-1] is not None and len(batch) < MAX_BATCH and time.monotonic() < deadline:
                try:
                    batch.append(self._ended.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            is_closing = batch[-1] is None
            requests = [each for each in batch if each is not None]
            try:
                is_exported = self._export(requests)
            except Exception:  # serving needs no spans
                log_exception()
                is_exported = False
            if not is_exported:
                self._on_dropped(len(requests))

    def _export(self, batch: list[tuple[Ended, int]]) -> bool:
        """Whether the collector has taken the spans; if not, the exporter has logged why."""
        for ended, ended_ns in batch:
            self._spans.add(ended, ended_ns)
        spans = self._spans.take()
        return not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS


class _Spans(SpanProcessor):
    """Timelines to OpenTelemetry's spans, which it keeps until they are taken."""

    def __init__(self, model_name: str) -> None:
        resource = Resource.create({SERVICE_NAME: "distserve"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # samples as OTEL_TRACES_SAMPLER says
        provider.add_span_processor(self)
        self._tracer = provider.get_tracer("distserve")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name
        self._ended: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._ended.append(span)

    def add(self, ended: Ended, ended_ns: int) -> None:
        timeline = ended.timeline
        end_ns = timeline.last_sent_ns or ended_ns
        root = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract({TRACE_PARENT: ended.trace_parent}),  # one that is none begins a trace
            kind=SpanKind.SERVER,
            attributes=self._attributes(ended),
            start_time=timeline.arrival_ns,
        )
        if ended.is_error:
            root.set_status(Status(StatusCode.ERROR, ended.outcome))
        attributes: dict[str, dict[str, float]] = {
            "prefill": {"distserve.replica": _prefill_replica(timeline)},
            "transfer": {
                "distserve.kv_bytes": timeline.kv_transfer_bytes,
                "distserve.kv_copy_s": timeline.kv_transfer_ns / 1e9,
            },
            "decode": {"distserve.replica": timeline.decode_replica},
        }
        for name, start_ns, phase_end_ns in phases(timeline, end_ns):
            span = self._tracer.start_span(
                name, set_span_in_context(root), attributes=attributes.get(name), start_time=start_ns
            )
            span.end(phase_end_ns)
        root.end(end_ns)

    def take(self) -> list[ReadableSpan]:
        spans, self._ended = self._ended, []
        return spans

    def _attributes(self, ended: Ended) -> dict[str, Any]:
        seconds = observed(ended)
        attributes: dict[str, Any] = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.usage.prompt_tokens": ended.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": ended.num_output_tokens,
            "distserve.outcome": ended.outcome,
            "distserve.num_recoveries": ended.timeline.num_recoveries,
            "distserve.num_preemptions": ended.timeline.num_preemptions,
            **{name: seconds[metric] for name, metric in _LATENCIES.items() if metric in seconds},
        }
        if ended.client_id:
            attributes["gen_ai.request.id"] = ended.client_id
        if ended.sampling is not None:
            attributes["gen_ai.request.max_tokens"] = ended.sampling.max_tokens
            attributes["gen_ai.request.temperature"] = ended.sampling.temperature
            attributes["gen_ai.request.top_p"] = ended.sampling.top_p
        return attributes


def _prefill_replica(timeline: Timeline) -> int:
    """Where the prompt was computed: at the decode replica if no other one is named."""
    return timeline.decode_replica if timeline.prefill_replica < 0 else timeline.prefill_replica


def spans_url(endpoint: str) -> str:
    """Where the spans go: an endpoint with a path is taken as it is."""
    _, _, rest = endpoint.partition("://")
    return endpoint if rest.partition("/")[2] else endpoint.rstrip("/") + TRACES_PATH


def phases(timeline: Timeline, end_ns: int) -> list[tuple[str, int, int]]:
    """Name, start and end of what a request went through: each begins where the one before ends.

    One that has failed ends, at `end_ns`, in the phase in which it was.
    """
    last_ns = timeline.last_token_ns or end_ns
    starts = [("queue", timeline.arrival_ns), ("prefill", timeline.first_scheduled_ns)]
    if timeline.decode_submitted_ns:
        joined_ns = timeline.decode_joined_ns
        starts += [("bridge", timeline.first_token_ns), ("transfer", timeline.decode_submitted_ns)]
        starts += [("decode", joined_ns if joined_ns >= timeline.decode_submitted_ns else 0)]
    elif timeline.first_token_ns != timeline.last_token_ns:
        is_handed_off = timeline.prefill_replica >= 0 and not timeline.last_token_ns
        starts += [("bridge" if is_handed_off else "decode", timeline.first_token_ns)]
    begun = [(name, start_ns) for name, start_ns in starts if start_ns]
    ends = [start_ns for _, start_ns in begun[1:]] + [last_ns]
    return [(name, start_ns, end) for (name, start_ns), end in zip(begun, ends, strict=True)]
