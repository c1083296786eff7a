"""How a client's cancel reaches the scheduler: asked of the Triton server, told by `postprocess`, or by the HTTP relay.

A cancelled ensemble request is seen by the steps that are executed after the cancel, never by the decoupled step that
runs: `postprocess` sees it, and tells the scheduler over a socket (handover.py). For that it needs a `cancel_handle`
among the scheduler's outputs, signed, since any client may call `postprocess`. While there is nothing to answer, the
scheduler sends heartbeats: responses of the handle alone, which are not passed on. A request of the ensemble is one
with a mark that `preprocess` signed (marks.py).

The relay (http_relay.py) knows no stream's number. It tags requests, and tells the tag of a client that has gone: such
a request needs no heartbeats.
"""

import contextlib
import heapq
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

import zmq

from ensemble.serving.handover import CANCELLED, PASSED
from ensemble.serving.run_dir import cancel_address, run_dir
from ensemble.serving.senders import SenderPool
from ensemble.serving.streams import ClientStream
from ensemble.threads import start_vital_thread

CHECK_INTERVAL_S = 0.1  # asking whether a request is cancelled is a round trip to the Triton server
HEARTBEAT_S = 0.2  # in which `postprocess` was not told to look for a cancel
MAX_HEARTBEATS = 100  # in each CHECK_INTERVAL_S: a heartbeat costs as much as a response
MAX_REMEMBERED = 8192
MAX_TOGETHER = 64  # numbers in one hand-over to the senders


class CancelWatch:
    """Looks after the live streams on a thread of its own; `on_cancel(request_id)` is called on it."""

    def __init__(
        self, live_streams: Callable[[], list[ClientStream]], on_cancel: Callable[[int], None], senders: SenderPool
    ) -> None:
        self._live_streams = live_streams
        self._on_cancel = on_cancel
        self._senders = senders
        self._closing = threading.Event()
        self._thread = start_vital_thread(self._run, "cancel-watch")

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._closing.is_set():
            started = time.monotonic()
            streams = self._live_streams()
            for stream in streams:
                with contextlib.suppress(Exception):  # the server stops, or has forgotten the request
                    if not stream.is_of_ensemble and stream.is_cancelled():
                        self._on_cancel(stream.request_id)
            for stream in heartbeats_due(streams, started):
                self._senders.heartbeat(stream)
            self._senders.give_up_lost()
            self._closing.wait(max(0.0, CHECK_INTERVAL_S - (time.monotonic() - started)))


def heartbeats_due(streams: Iterable[ClientStream], now: float) -> list[ClientStream]:
    """Of which streams, those first that have waited longest for it, at most MAX_HEARTBEATS."""
    due = [
        stream
        for stream in streams
        if stream.needs_heartbeats and stream.pace.is_clear and now - stream.last_asked >= HEARTBEAT_S
    ]
    return heapq.nsmallest(MAX_HEARTBEATS, due, key=lambda stream: stream.last_asked)


class Answer(Protocol):
    """What a client waits for: one stream, or several choices."""

    @property
    def request_ids(self) -> list[int]: ...


class CancelReceiver:
    """The scheduler's end. On a thread of its own `on_cancel(request_id)` is called, and `on_passed` with all
    (request_id, number) that have come together."""

    def __init__(self, on_cancel: Callable[[int], None], on_passed: Callable[[list[tuple[int, int]]], None]) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(cancel_address(run_dir()))
        self._on_cancel, self._on_passed = on_cancel, on_passed
        self._lock = threading.Lock()
        self._tagged: weakref.WeakValueDictionary[str, Answer] = weakref.WeakValueDictionary()
        self._gone: OrderedDict[str, None] = OrderedDict()  # tags told before their request came; oldest first
        self._thread = start_vital_thread(self._run, "cancel-receiver")

    def watch(self, answer: Answer, tag: str) -> None:
        """Cancels what has been submitted when the relay tells its tag, or at once if it has."""
        with self._lock:
            self._tagged[tag] = answer
            is_gone = tag in self._gone
        for request_id in answer.request_ids if is_gone else []:
            self._on_cancel(request_id)

    def close(self) -> None:
        self._context.term()  # the thread closes its socket
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while True:
                passed: list[tuple[int, int]] = []
                self._receive(self._socket.recv(), passed)
                with contextlib.suppress(zmq.Again):
                    while len(passed) < MAX_TOGETHER:
                        self._receive(self._socket.recv(zmq.NOBLOCK), passed)
                if passed:
                    self._on_passed(passed)
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def _receive(self, message: bytes, passed: list[tuple[int, int]]) -> None:
        kind, *numbers = message.decode(errors="replace").split(" ")
        if kind == PASSED and numbers:
            passed.extend(zip(map(int, numbers[::2]), map(int, numbers[1::2]), strict=False))
        elif kind == CANCELLED and numbers:
            self._on_cancel(int(numbers[0]))
        elif not numbers:
            self._client_gone(kind)

    def _client_gone(self, tag: str) -> None:
        with self._lock:
            answer = self._tagged.get(tag)
            if answer is None:  # its request has ended, or is yet to come
                self._gone[tag] = None
                if len(self._gone) > MAX_REMEMBERED:
                    self._gone.popitem(last=False)
        for request_id in answer.request_ids if answer is not None else []:
            self._on_cancel(request_id)
