"""The thread that owns the router. Everything else (exchanges with the stages, sends to clients, metrics) is on other
threads, which report by putting a function into its inbox.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ensemble.config import Deployment, StageName
from ensemble.errors import DistServeError, ErrorCode
from ensemble.operator_log import log_exception
from ensemble.protocol.router_replica import FromStage, ToStage
from ensemble.request import FinishReason, Request, TokenLogProbs
from ensemble.router.events import Observe
from ensemble.router.gauges import Gauges
from ensemble.router.lives import Timeline
from ensemble.router.router import Router
from ensemble.scheduling.policies import Hints
from ensemble.serving.ended_request import Ended
from ensemble.serving.exchange import CallModel, Exchange
from ensemble.serving.senders import SenderPool
from ensemble.serving.streams import ClientStream
from ensemble.threads import end_process

T = TypeVar("T")
MAX_WAIT_S = 1.0  # between two ticks
OnEnded = Callable[[Ended], None]


class StreamClient:
    """A client's stream, as the router sees it."""

    def __init__(self, stream: ClientStream, senders: SenderPool, on_ended: OnEnded) -> None:
        self.stream = stream
        self._senders = senders
        self._on_ended = on_ended

    @property
    def timeline(self) -> Timeline:
        return self.stream.timeline

    @property
    def hints(self) -> Hints:
        return self.stream.hints

    @property
    def deadline(self) -> float | None:
        return self.stream.deadline

    @property
    def is_answered(self) -> bool:
        return self.stream.is_answered

    def take(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None) -> None:
        self.stream.num_output_tokens += 1
        self._senders.push(self.stream, token_id, finish_reason, log_probs)

    def fail(self, error: DistServeError) -> None:
        self._senders.fail(self.stream, error)
        self._count(error.code, is_error=True)

    def ended(self) -> None:
        self.stream.num_output_tokens = self.stream.num_sent_tokens
        self._count(self.stream.finish_reason or "stop", is_error=False)

    def _count(self, outcome: FinishReason | ErrorCode, is_error: bool) -> None:
        stream = self.stream
        self._on_ended(
            Ended(
                stream.timeline,
                stream.num_prompt_tokens,
                stream.num_output_tokens,
                outcome,
                is_error,
                stream.targets,
                stream.client_id,
                stream.trace_parent,
                stream.request.sampling,
            )
        )


class RouterThread:
    """Its methods may be called from any thread."""

    def __init__(
        self,
        deployment: Deployment,
        call_model: CallModel,
        senders: SenderPool,
        new_id: Callable[[], int],
        on_ended: OnEnded = lambda ended: None,
        observe: Observe = lambda name, values, labels: None,
        on_serving: Callable[[bool], None] = lambda is_serving: None,  # when that changes
    ) -> None:
        self._senders = senders
        self._on_ended = on_ended
        self._on_serving = on_serving
        self._was_serving: bool | None = None
        self._streams: dict[int, ClientStream] = {}  # request_id |-> live request, added by any thread
        self._router = Router(deployment, self._send, new_id, time.monotonic(), observe)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        run = secrets.token_hex(8)
        stages: list[StageName] = ["prefill", "decode"]
        self._exchanges = {stage: Exchange(stage, run, call_model, self._receive) for stage in stages}
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)
        self._thread.start()

    def submit(self, request: Request, stream: ClientStream, same_prompt: int | None = None) -> None:
        """`same_prompt`: an earlier request, with the same prompt."""
        self._inbox.put(lambda: self._arrive(request, stream, same_prompt))

    def cancel(self, request_id: int) -> None:
        """Ends a request wherever it is; its client gets CANCELLED."""
        self._inbox.put(lambda: self._router.cancel(request_id))

    def answered(self, request_id: int) -> None:
        """Ends a request whose last response was sent, after its last token or a stop string."""
        self._inbox.put(lambda: self._router.answered(request_id))

    def live_streams(self) -> list[ClientStream]:
        return list(self._streams.copy().values())

    def ask(self, question: Callable[[Router], T], timeout_s: float = 1.0) -> T:
        """What the router answers, on its thread. Raises queue.Empty if it is too busy, or what the question does."""
        answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def put() -> None:
            try:
                answers.put((question(self._router), None))
            except Exception as error:
                answers.put((None, error))

        self._inbox.put(put)
        answer, error = answers.get(timeout=timeout_s)
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]  # it is one, since nothing was raised

    def gauges(self) -> Gauges:
        """What is the case now, for the metrics; empty if the router is too busy to tell within a second."""
        try:
            return self.ask(Router.gauges)
        except queue.Empty:
            return {}

    def close(self) -> None:
        """Ends every request with an error, then the threads."""
        self._closing.set()
        self._inbox.put(self._router.close)
        self._thread.join(timeout=2.0)
        for exchange in self._exchanges.values():
            exchange.close()

    # ---- on the threads of others

    def _receive(self, items: list[FromStage]) -> None:
        self._inbox.put(lambda: self._received(items))

    # ---- the router's thread

    def _run(self) -> None:
        try:
            while not (self._closing.is_set() and self._inbox.empty()):
                deadline = self._router.next_deadline
                timeout_s = MAX_WAIT_S if deadline is None else min(MAX_WAIT_S, max(0.0, deadline - time.monotonic()))
                with contextlib.suppress(queue.Empty):
                    self._do(self._inbox.get(timeout=timeout_s))
                while not self._inbox.empty():
                    self._do(self._inbox.get())
                self._router.tick(time.monotonic())
                self._tell_serving()
        except Exception as error:  # a fault of ours that leaves the books, which all depend on, in doubt
            log_exception()
            end_process(f"the router failed: {type(error).__name__}: {error}")

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # of one request, or one event: it harms no other
            log_exception()

    def _received(self, items: list[FromStage]) -> None:
        now = time.monotonic()
        for item in items:
            self._do(lambda item=item: self._router.receive(item, now))  # type: ignore[misc]
        self._senders.flush()

    def _arrive(self, request: Request, stream: ClientStream, same_prompt: int | None) -> None:
        self._streams[request.request_id] = stream

        def ended(ended: Ended) -> None:
            self._streams.pop(request.request_id, None)
            self._on_ended(ended)

        self._router.arrive(request, StreamClient(stream, self._senders, ended), time.monotonic(), same_prompt)

    def _send(self, stage: StageName, item: ToStage) -> None:
        self._exchanges[stage].send(item)

    def _tell_serving(self) -> None:
        if self._router.is_serving != self._was_serving:
            self._was_serving = self._router.is_serving
            self._on_serving(self._was_serving)
