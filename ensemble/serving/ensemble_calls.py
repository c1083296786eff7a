"""A request of an ensemble, which is a step of the `scheduler` model and one of `answer` behind it.

The Triton server shows an ensemble's cancel only to steps that start after it, never to one that runs, and the step of
an answer runs as long as the answer. A step behind it would see the cancel, and would cost each response a second way
through the server. So a step before it takes the request, and stays open: each of its responses, a handle, starts the
step behind it anew. The first start carries the answer, straight to the client; later ones, the pings, look for a
cancel, and end.

A response is an ensemble's last if no step is open after it. So the first step ends before it, and no ping is out. An
error must not come while another step is open at all: the 24.10 server would never release that request.
"""

import contextlib
import heapq
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from ensemble.errors import DistServeError, InternalError, StageUnavailable
from ensemble.operator_log import log_exception
from ensemble.serving.marks import stream_handle
from ensemble.serving.streams import ClientCall, Outputs

PING_S = 0.3  # between two pings of a request
TOLD_PING_S = 5.0  # of one whose cancel the HTTP relay tells, unless that has died
# In a tick, which is every 0.1 s: a ping costs as much as a response (senders.py).
MAX_PINGS = min(40, 5 * len(os.sched_getaffinity(0)))
LATE_S = 1.0  # a response does not wait longer for a ping: at worst an empty one comes after it
LOST_S = 60.0  # nothing waits longer for a step that is to start


class FirstStep(ClientCall, Protocol):
    """An execution of the `scheduler` model."""

    def end(self) -> None:
        """Without a response."""
        ...


class Step(Protocol):
    """An execution of the `answer` model (answer_steps.py)."""

    def send(self, outputs: Outputs, final: bool) -> None: ...

    def send_error(self, error: DistServeError) -> None: ...

    def end(self, on_ended: Callable[[], None]) -> None:
        """Without a response; `on_ended` is called from any thread when it has ended."""
        ...


class EnsembleCall:
    """The `ClientCall` of such a request: its streams send nothing before `on_start` was called. Its methods may be
    called from any thread."""

    def __init__(self, first: FirstStep, is_told: bool) -> None:
        """`is_told`: of its cancel the relay tells."""
        self.request_id, self.parameters = first.request_id, first.parameters
        self.request_ids: list[int] = []  # from `begin` on
        self.is_ended = False
        self._ping_s = TOLD_PING_S if is_told else PING_S
        self._lock = threading.Lock()
        self._first, self._is_first_open = first, True
        self._handle: Outputs = {}  # what starts the step behind
        self._on_start: Callable[[], None] = _nothing
        self._answer: Step | None = None  # that step
        self._last_sign = time.monotonic()  # when it began, or was last pinged
        self._is_pinged = False  # and the step that looks has not ended
        self._end: tuple[Callable[[Step], None], bool] | None = None  # waits for that; True: it is an error

    def begin(self, request_ids: list[int], on_start: Callable[[], None]) -> None:
        """Starts the step of the answer to these requests, unless they have failed already."""
        with self._lock:
            if self.is_ended:
                return
            self.request_ids, self._on_start, self._last_sign = request_ids, on_start, time.monotonic()
            self._handle = {"stream_handle": np.array([stream_handle(request_ids[0]).encode()], dtype=object)}
            try:
                self._first.send(self._handle, final=False)
            except Exception as error:
                self._fail_first(InternalError(f"the answer's step could not be started: {error}"))
                raise

    def started(self, step: Step) -> None:
        """The step behind the first has started; not for the first time: a ping has come."""
        with self._lock:
            is_answer = self._answer is None and not self.is_ended
            if is_answer:
                self._answer = step
                on_start, self._on_start = self._on_start, _nothing  # it knows the streams, and they this call
        if is_answer:
            on_start()
        else:
            step.end(self._ping_ended)

    def send(self, outputs: Outputs, final: bool) -> None:
        if final:
            self._finish(lambda step: step.send(outputs, final=True), is_error=False)
        else:
            with self._lock:
                self._answering.send(outputs, final=False)

    def send_error(self, error: DistServeError) -> None:
        with self._lock:
            if not self._handle:  # no step behind the first was ever to start
                self._fail_first(error)
                return
        self._finish(lambda step: step.send_error(error), is_error=True)

    def is_cancelled(self) -> bool:
        return False  # the server tells it the steps that start, never one that runs

    def _ping_ended(self) -> None:
        with self._lock:
            self._is_pinged = False
            self._end_at_last()

    # ---- now and then

    def lateness(self, now: float) -> float:
        """Of its next ping, in intervals of its pings: from 1 on it is due. 0: it needs none."""
        is_open = self._answer is not None and self._is_first_open and not self._is_pinged
        return (now - self._last_sign) / self._ping_s if is_open else 0.0

    def ping(self, now: float) -> None:
        with self._lock:
            if self.lateness(now) >= 1.0:
                self._last_sign = now
                self._first.send(self._handle, final=False)
                self._is_pinged = True  # the step that looks needs the lock, too

    def give_up_lost(self, now: float) -> bool:
        """Waits no longer for what is late or lost. Whether the answer's step is lost, and so the request."""
        with self._lock:
            waited = now - self._last_sign
            if self._end is not None and waited > (LOST_S if self._end[1] else LATE_S):
                self._end_at_last()
            is_lost = self._answer is None and not self.is_ended and bool(self._handle) and waited > LOST_S
            if is_lost:
                self._fail_first(StageUnavailable("scheduler", "the Triton server does not start its step"))
            return is_lost

    def stop_pinging(self) -> None:
        """Whoever ends waits for no ping any more."""
        with self._lock:
            self._ping_s, self._is_pinged = float("inf"), False
            self._end_at_last()

    # ---- under the lock

    @property
    def _answering(self) -> Step:
        assert self._answer is not None, "streams wait for the start"
        return self._answer

    def _finish(self, act: Callable[[Step], None], is_error: bool) -> None:
        with self._lock:
            if self._is_pinged:
                self._end = act, is_error
                return
            self._end_first()
            act(self._answering)

    def _end_at_last(self) -> None:
        """For the stream it has ended already."""
        if self._end is None:
            return
        (act, _), self._end = self._end, None
        self._end_first()
        with contextlib.suppress(Exception):  # the instance takes nothing any more, and the server ends
            act(self._answering)

    def _fail_first(self, error: DistServeError) -> None:
        """Ends the request where the step of the answer will not."""
        self._is_first_open, self.is_ended, self._on_start = False, True, _nothing
        with contextlib.suppress(Exception):  # the server takes no answer any more
            self._first.send_error(error)

    def _end_first(self) -> None:
        self.is_ended = True
        if self._is_first_open:
            self._is_first_open = False
            with contextlib.suppress(Exception):  # of the Triton server
                self._first.end()


def _nothing() -> None:
    pass


class EnsembleCalls:
    """Those that run. Its methods may be called from any thread."""

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._calls: dict[int, EnsembleCall] = {}  # by the first of its requests

    def begin(self, call: EnsembleCall, request_ids: list[int], on_start: Callable[[], None]) -> None:
        with self._lock:
            self._calls[request_ids[0]] = call
        try:
            call.begin(request_ids, on_start)
        except Exception:  # of the Triton server
            log_exception()
            self._cancel_all(call)

    def started(self, request_id: int, step: Step, is_cancelled: bool) -> None:
        """A step behind this request's first has started, for a client that has cancelled or not."""
        call = self._calls.get(request_id)
        if call is None:
            step.end(_nothing)
            return
        if is_cancelled:
            self._cancel_all(call)
        call.started(step)

    def failed(self, request_id: int) -> None:
        """A response of a step behind this request's first could not be sent."""
        call = self._calls.get(request_id)
        if call is not None:
            self._cancel_all(call)

    def tick(self, now: float) -> None:
        """Pings the latest first, and forgets those that have ended."""
        with self._lock:
            self._calls = {number: call for number, call in self._calls.items() if not call.is_ended}
            calls = list(self._calls.values())
        for call in calls:
            with contextlib.suppress(Exception):  # the server stops, or has forgotten the request
                if call.give_up_lost(now):
                    self._cancel_all(call)
        lateness = {call: late for call in calls if (late := call.lateness(now)) >= 1.0}
        for call in heapq.nlargest(MAX_PINGS, lateness, key=lateness.__getitem__):
            with contextlib.suppress(Exception):  # the server stops, or has forgotten the request
                call.ping(now)

    def close(self) -> None:
        """The server stops, and starts no more steps."""
        for call in list(self._calls.values()):
            call.stop_pinging()

    def _cancel_all(self, call: EnsembleCall) -> None:
        for request_id in call.request_ids:
            self._cancel(request_id)
