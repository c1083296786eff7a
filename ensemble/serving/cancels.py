"""How a client's cancel reaches the scheduler: asked of the Triton server, told by `postprocess`, or by the HTTP relay.

A cancelled ensemble request is seen by the steps that are executed after the cancel, never by the decoupled step that
runs: `postprocess` sees it, and tells the scheduler over a socket. For that it needs a `cancel_handle` among the
scheduler's outputs: the number of the stream and that of the response (window.py), signed, since any client may call
`postprocess`. While there is nothing to answer, the scheduler sends heartbeats: responses of the handle alone, which
are not passed on. A request of the ensemble is one with a mark that `preprocess` signed (marks.py).

The relay (http_relay.py) knows no stream's number. It tags requests, and tells the tag of a client that has gone.
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

from ensemble.serving.marks import read_cancel_handle
from ensemble.serving.run_dir import cancel_address, run_dir
from ensemble.serving.streams import ClientStream
from ensemble.threads import start_vital_thread

CHECK_INTERVAL_S = 0.1  # asking whether a request is cancelled is a round trip to the Triton server
HEARTBEAT_S = 0.2  # without a response that carries a handle
MAX_HEARTBEATS = 100  # in each CHECK_INTERVAL_S: a heartbeat costs as much as a response
MAX_REMEMBERED = 8192
PASSED, CANCELLED = "passed", "cancelled"  # what `postprocess` tells; the relay tells a tag alone


class CancelWatch:
    """Looks after the live streams on a thread of its own; `on_cancel(request_id)` is called on it."""

    def __init__(self, live_streams: Callable[[], list[ClientStream]], on_cancel: Callable[[int], None]) -> None:
        self._live_streams = live_streams
        self._on_cancel = on_cancel
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
                    if not stream.needs_heartbeats and stream.is_cancelled():
                        self._on_cancel(stream.request_id)
            for stream in heartbeats_due(streams, started):
                with contextlib.suppress(Exception):
                    stream.send_heartbeat()
            self._closing.wait(max(0.0, CHECK_INTERVAL_S - (time.monotonic() - started)))


def heartbeats_due(streams: Iterable[ClientStream], now: float) -> list[ClientStream]:
    """Of which streams, those first that have waited longest for it, at most MAX_HEARTBEATS."""
    due = [stream for stream in streams if stream.needs_heartbeats and now - stream.last_handle >= HEARTBEAT_S]
    return heapq.nsmallest(MAX_HEARTBEATS, due, key=lambda stream: stream.last_handle)


class Answer(Protocol):
    """What a client waits for: one stream, or several choices."""

    @property
    def request_ids(self) -> list[int]: ...


class CancelReceiver:
    """The scheduler's end: `on_cancel(request_id)` and `on_passed(number)` are called on a thread of its own."""

    def __init__(self, on_cancel: Callable[[int], None], on_passed: Callable[[int], None]) -> None:
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
                message = self._socket.recv().decode(errors="replace")
                kind, _, number = message.partition(" ")
                if not number:
                    self._client_gone(message)
                elif kind == PASSED:
                    self._on_passed(int(number))
                elif kind == CANCELLED:
                    self._on_cancel(int(number))
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def _client_gone(self, tag: str) -> None:
        with self._lock:
            answer = self._tagged.get(tag)
            if answer is None:  # its request has ended, or is yet to come
                self._gone[tag] = None
                if len(self._gone) > MAX_REMEMBERED:
                    self._gone.popitem(last=False)
        for request_id in answer.request_ids if answer is not None else []:
            self._on_cancel(request_id)


class CancelSender:
    """`postprocess`'s end, on its one thread."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.connect(cancel_address(run_dir()))

    def passed(self, handle: str, is_cancelled: bool) -> None:
        """Tells the scheduler how far its responses have come, and if the stream's client is gone. Never waits."""
        known = read_cancel_handle(handle)
        if known is None:
            return  # a client's own, sent to `postprocess` itself
        request_id, number = known
        with contextlib.suppress(zmq.Again):  # nobody takes them; a later one tells the same
            self._socket.send(f"{PASSED} {number}".encode(), zmq.NOBLOCK)
            if is_cancelled:
                self._socket.send(f"{CANCELLED} {request_id}".encode(), zmq.NOBLOCK)

    def close(self) -> None:
        self._context.destroy(linger=0)
