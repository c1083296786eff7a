"""What the `scheduler` model does: takes clients' requests in, has the orchestrator run them, notices cancels."""

import itertools
import json
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError, InternalError, Overloaded, StageUnavailable
from ensemble.operator_log import tell_operator
from ensemble.router.lives import Timeline
from ensemble.serving import control, heartbeat
from ensemble.serving.answer_steps import AnswerSteps
from ensemble.serving.cancels import CancelReceiver, CancelWatch
from ensemble.serving.choices import Choices
from ensemble.serving.ended_request import Ended
from ensemble.serving.ensemble_calls import EnsembleCall, EnsembleCalls, FirstStep
from ensemble.serving.exchange import CallModel
from ensemble.serving.fields import OF_THE_SERVER, from_tensor, text_of
from ensemble.serving.fleet_commands import fleet_handlers
from ensemble.serving.inputs import check_envelope, parse_request
from ensemble.serving.limits import ModelLimits
from ensemble.serving.long_texts import LongTexts, prompt_bytes
from ensemble.serving.marks import CLIENT_TAG, ENSEMBLE_MARK, TRACE_PARENT, read_mark
from ensemble.serving.metric_families import ITL
from ensemble.serving.metrics import Metrics
from ensemble.serving.metrics_page import MetricsPage
from ensemble.serving.router_thread import RouterThread
from ensemble.serving.run_dir import run_dir
from ensemble.serving.senders import SenderPool
from ensemble.serving.streams import ClientCall, ClientStream
from ensemble.tokenizer import Tokenizer

if TYPE_CHECKING:  # it brings OpenTelemetry, which is for those alone who ask for it
    from ensemble.serving.traces import Traces

Tensors = Mapping[str, npt.NDArray[Any]]


class FrontDoor:
    """`handle` may be called from any thread; it returns at once, answers come later."""

    def __init__(self, deployment: Deployment, call_model: CallModel) -> None:
        self._tokenizer = Tokenizer.from_dir(deployment.model.path)
        self._chat = ChatTemplate.from_dir(deployment.model.path)
        if self._chat.fault:
            tell_operator(f"`messages` cannot be served: {self._chat.fault}")
        self._limits = ModelLimits.of(deployment, self._tokenizer)
        self._long_texts = LongTexts(self._limits.max_text_bytes)
        self._request_ids = itertools.count(secrets.randbits(40) << 20)  # no other run's: stages may outlive this one
        self._metrics = Metrics(deployment.model.name)
        self._traces = make_traces(deployment, self._without_spans)
        self._senders = SenderPool(self._answered, self._send_failed, partial(self._metrics.observe, ITL))
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[ClientStream] = weakref.WeakSet()
        self._is_draining = False
        # Its calls fail until the Triton server, which forbids BLS while a model initialises, lets them through.
        self._router = RouterThread(
            deployment,
            call_model,
            self._senders,
            self._request_ids.__next__,
            self._count,
            self._metrics.observe,
            self._tell_serving,
        )
        self._page = MetricsPage.from_environment(lambda: self._metrics.text(self._router.gauges()))
        self._ensemble_calls = EnsembleCalls(self._router.cancel)
        self._answer_steps = AnswerSteps(self._ensemble_calls.started, self._ensemble_calls.failed)
        self._cancels = CancelReceiver(self._router.cancel, self._senders.passed)
        self._watch = CancelWatch(self._router.live_streams, self._router.cancel, self._senders, self._ensemble_calls)
        handlers: Mapping[type[control.Command[Any]], Callable[[Any], msgspec.Struct]] = {
            control.Status: self._load,
            control.Drain: self._drain,
            control.EndAll: self._end_all,
            **fleet_handlers(self._router),
        }
        self._control = control.ControlServer(run_dir(), handlers)

    def handle(self, call: FirstStep, tensors: Tensors) -> None:
        """Takes one request; every outcome, errors too, goes to `call`."""
        work = partial(self._take, call, tensors, time.time_ns())
        if self._long_texts.is_long(prompt_bytes(tensors)):
            try:
                self._long_texts.submit(work)
            except Overloaded as error:
                self._refuse(call, error, time.time_ns(), "")
        else:
            work()

    def close(self) -> None:
        self._control.close()
        self._watch.close()
        self._long_texts.close()
        self._ensemble_calls.close()
        if self._page is not None:
            self._page.close()
        self._router.close()
        self._senders.close()
        self._answer_steps.close()
        self._cancels.close()
        if self._traces is not None:  # with the spans of what the router has ended just now
            self._traces.close()

    def _take(self, step: FirstStep, tensors: Tensors, arrival_ns: int) -> None:
        call: ClientCall = step
        trace_parent = ""
        try:
            check_envelope(call.request_id, call.parameters)
            parameters = json.loads(call.parameters)
            tag = parameters.pop(CLIENT_TAG, None)
            trace_parent = text_of(TRACE_PARENT, parameters.pop(TRACE_PARENT, ""))
            own = {name: value for name, value in parameters.items() if not OF_THE_SERVER.fullmatch(name)}
            first_id = next(self._request_ids)
            client_request = parse_request(tensors, own, first_id, self._tokenizer, self._chat, self._limits)
            mark = (
                read_mark(str(from_tensor(ENSEMBLE_MARK, tensors[ENSEMBLE_MARK]))) if ENSEMBLE_MARK in tensors else None
            )
        except Exception as error:
            known = error if isinstance(error, DistServeError) else InternalError(f"{type(error).__name__}: {error}")
            # The traceback knows this frame, and this frame the error: a huge text would wait for the collector.
            self._refuse(call, known.with_traceback(None), arrival_ns, trace_parent)
            return
        ensemble_call = None
        if mark is not None and mark.is_of_ensemble:
            call = ensemble_call = EnsembleCall(step, is_told=tag is not None)
        choices = [client_request]
        if client_request.num_choices > 1:
            more = range(1, client_request.num_choices)
            choices += [client_request.nth_choice(choice, next(self._request_ids)) for choice in more]
            request_ids = [each.request.request_id for each in choices]
            call = Choices(call, request_ids, client_request.options.stream, self._router.cancel)
        since = arrival_ns if mark is None else mark.arrival_ns
        streams = [
            ClientStream(
                call,
                each,
                self._tokenizer,
                since,
                is_started=ensemble_call is None,
                is_paced=mark is not None,
                trace_parent=trace_parent,
            )
            for each in choices
        ]
        with self._lock:
            is_draining = self._is_draining
            if not is_draining:
                self._streams.update(streams)
        if is_draining:
            self._refuse(call, StageUnavailable("scheduler", "the server is draining"), arrival_ns, trace_parent)
            return
        first, *others = streams
        self._router.submit(first.request, first)
        for stream in others:
            self._router.submit(stream.request, stream, same_prompt=first.request_id)
        if tag is not None:
            self._cancels.watch(call if isinstance(call, Choices) else streams[0], str(tag))
        if ensemble_call is not None:
            request_ids = [stream.request_id for stream in streams]
            self._ensemble_calls.begin(ensemble_call, request_ids, partial(self._senders.start, streams))

    def _refuse(self, call: ClientCall, error: DistServeError, arrival_ns: int, trace_parent: str) -> None:
        call.send_error(error)
        self._count(Ended(Timeline(arrival_ns), 0, 0, error.code, is_error=True, trace_parent=trace_parent))

    def _count(self, ended: Ended) -> None:
        self._metrics.count(ended)
        if self._traces is not None:
            self._traces.record(ended)

    def _without_spans(self, number: int) -> None:
        self._metrics.add("distserve:requests_without_spans_total", number)

    def _answered(self, stream: ClientStream) -> None:
        self._router.answered(stream.request_id)

    def _send_failed(self, stream: ClientStream, error: Exception) -> None:
        """The client is gone, or our answer is faulty."""
        stream.abort(InternalError(f"the answer could not be sent: {type(error).__name__}: {error}"))
        self._router.cancel(stream.request_id)

    def _tell_serving(self, is_serving: bool) -> None:
        with self._lock:
            heartbeat.set_serving(is_serving and not self._is_draining)

    # ---- commands

    def _open_streams(self) -> list[ClientStream]:
        with self._lock:
            return [stream for stream in self._streams if not stream.is_closed]

    def _load(self, command: object) -> control.Load:
        return control.Load(len(self._open_streams()), self._is_draining)

    def _drain(self, command: control.Drain) -> control.Load:
        with self._lock:
            self._is_draining = True
        heartbeat.set_serving(False)
        return self._load(command)

    def _end_all(self, command: control.EndAll) -> control.Load:
        for stream in self._open_streams():
            self._senders.fail(stream, StageUnavailable("scheduler", "the server is stopping"))
        return self._load(command)


def make_traces(deployment: Deployment, on_dropped: Callable[[int], None]) -> "Traces | None":
    if deployment.otlp_endpoint is None:
        return None
    from ensemble.serving.traces import Traces

    return Traces(deployment.otlp_endpoint, deployment.model.name, on_dropped)
