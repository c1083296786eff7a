"""A request of an ensemble, which is two steps of the `scheduler` model.

The Triton server shows an ensemble's cancel only to steps that start after it, never to one that runs, and the step of
an answer runs as long as the answer. A step behind it would see the cancel, and would cost each response a second way
through the server. So a step before it takes the request, and stays open: each of its responses, a handle, starts the
step behind it anew. The first start carries the answer, straight to the client; later ones, the pings, look for a
cancel, and end. Of a client that came through the HTTP relay the relay tells: its first step ends with the handle.

A response is an ensemble's last if no step is open after it. So the first step ends before it, and no ping is out.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ensemble.errors import DistServeError, InvalidRequest, StageUnavailable
from ensemble.serving.marks import read_stream_handle, stream_handle
from ensemble.serving.streams import ClientCall, Outputs

PING_S = 0.3  # between two pings of a request
MAX_PINGS = 50  # in a tick, which is every 0.1 s: a ping costs as much as a response
LOST_S = 1.0  # a ping that has not come back after that never will
START_S = 10.0  # nor will the step of the answer start after that
Act: TypeAlias = Callable[[ClientCall], None]


class EnsembleCall:
    """The `ClientCall` of such a request. Its methods may be called from any thread."""

    def __init__(self, first: ClientCall, is_told: bool) -> None:
        """`is_told`: of its cancel the relay tells."""
        self.request_id, self.parameters = first.request_id, first.parameters
        self.request_ids: list[int] = []  # from `begin` on
        self.last_sign = time.monotonic()  # when it began, or was last pinged
        self.is_ended = False
        self._is_told = is_told
        self._lock = threading.Lock()
        self._first = first
        self._handle: Outputs | None = None  # what starts the step behind
        self._answer: ClientCall | None = None  # that step
        self._waiting: deque[tuple[Act, bool]] = deque()  # for that step; True: for the last ping too
        self._is_pinged = False

    def begin(self, request_ids: list[int]) -> None:
        """Starts the step of the answer to these requests, unless they have failed already."""
        with self._lock:
            if not self.is_ended:
                self.request_ids, self.last_sign = request_ids, time.monotonic()
                self._handle = {"stream_handle": np.array([stream_handle(request_ids[0]).encode()], dtype=object)}
                self._first.send(self._handle, final=self._is_told)

    def started(self, step: ClientCall) -> None:
        """The step behind the first has started, or, for a ping, has been started again."""
        with self._lock:
            if self._answer is None and not self.is_ended:
                self._answer = step
            else:
                step.end()
                self._is_pinged = False
            self._go_on()

    def ping(self, now: float) -> None:
        with self._lock:
            if self._answer is not None and not (self.is_ended or self._is_told or self._is_pinged):
                self._is_pinged, self.last_sign = True, now
                self._first.send(self._handle or {}, final=False)

    def give_up_lost(self, now: float) -> None:
        """Waits no longer for a step that will not start. Raises StageUnavailable if it is that of the answer."""
        with self._lock:
            if self._is_pinged and now - self.last_sign > LOST_S:
                self._is_pinged = False
                self._go_on()
            if self._answer is None and not self.is_ended and now - self.last_sign > START_S:
                self.is_ended = True
                error = StageUnavailable("scheduler", "the Triton server does not start its step")
                if not self._is_told:
                    self._first.send_error(error)
                raise error

    def send(self, outputs: Outputs, final: bool) -> None:
        self._put(lambda step: step.send(outputs, final), final)

    def send_error(self, error: DistServeError) -> None:
        with self._lock:
            is_first_alone = self._handle is None
            if is_first_alone:
                self.is_ended = True
                self._first.send_error(error)
        if not is_first_alone:
            self._put(lambda step: step.send_error(error), is_last=True)

    def end(self) -> None:
        """Without an answer."""
        self._put(lambda step: step.end(), is_last=True)

    def is_cancelled(self) -> bool:
        return False  # the server tells it the steps that start, never one that runs

    def _put(self, act: Act, is_last: bool) -> None:
        with self._lock:
            if not self.is_ended:
                self._waiting.append((act, is_last))
            self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._answer is not None and not self.is_ended:
            act, is_last = self._waiting[0]
            if is_last and self._is_pinged:
                return
            self._waiting.popleft()
            if is_last:
                self.is_ended = True
                if not self._is_told:
                    self._first.end()
            act(self._answer)


class EnsembleCalls:
    """Those that run. Its methods may be called from any thread."""

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._calls: OrderedDict[int, EnsembleCall] = (
            OrderedDict()
        )  # by the first of its requests; longest not pinged first

    def begin(self, call: EnsembleCall, request_ids: list[int]) -> None:
        with self._lock:
            self._calls[request_ids[0]] = call
        call.begin(request_ids)

    def started(self, handle: str, step: ClientCall, is_cancelled: bool) -> None:
        """A step with a handle has started. Raises InvalidRequest if that is a client's own."""
        number = read_stream_handle(handle)
        if number is None:
            raise InvalidRequest("stream_handle", handle[:64], "there is no input of this name")
        call = self._calls.get(number)
        if call is None:
            step.end()
            return
        call.started(step)
        for request_id in call.request_ids if is_cancelled else []:
            self._cancel(request_id)

    def tick(self, now: float) -> None:
        """Pings those first that have waited longest for it, and forgets those that have ended."""
        due: list[EnsembleCall] = []
        with self._lock:
            for number, call in list(self._calls.items()):
                if call.is_ended:
                    del self._calls[number]
                elif len(due) < MAX_PINGS and now - call.last_sign >= PING_S:
                    due.append(call)
                    self._calls.move_to_end(number)
        for call in due:
            try:
                call.give_up_lost(now)
                call.ping(now)
            except Exception:  # the server stops, or has forgotten the request
                for request_id in call.request_ids:
                    self._cancel(request_id)
