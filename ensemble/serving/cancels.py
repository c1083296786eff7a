"""How a client's cancel reaches the scheduler: asked of the Triton server, or told by the HTTP relay.

Of an ensemble's request the server does not tell when it is asked: ensemble_calls.py. The relay (http_relay.py) knows
no stream's number. It tags requests, and tells the tag of a client that has gone.
"""

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import zmq

from ensemble.serving.ensemble_calls import EnsembleCalls
from ensemble.serving.handover import PASSED
from ensemble.serving.run_dir import cancel_address, run_dir
from ensemble.serving.senders import SenderPool
from ensemble.serving.streams import ClientStream
from ensemble.threads import start_vital_thread

CHECK_INTERVAL_S = 0.1  # asking whether a request is cancelled is a round trip to the Triton server
MAX_REMEMBERED = 8192
MAX_TOGETHER = 64  # numbers in one hand-over to the senders


class CancelWatch:
    """Looks after the live streams on a thread of its own; `on_cancel(request_id)` is called on it."""

    def __init__(
        self,
        live_streams: Callable[[], list[ClientStream]],
        on_cancel: Callable[[int], None],
        senders: SenderPool,
        ensemble_calls: EnsembleCalls,
    ) -> None:
        self._live_streams = live_streams
        self._on_cancel = on_cancel
        self._senders, self._ensemble_calls = senders, ensemble_calls
        self._closing = threading.Event()
        self._thread = start_vital_thread(self._run, "cancel-watch")

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._closing.is_set():
            started = time.monotonic()
            for stream in self._live_streams():
                with contextlib.suppress(Exception):  # the server stops, or has forgotten the request
                    if stream.is_cancelled():
                        self._on_cancel(stream.request_id)
            self._senders.give_up_lost()
            self._ensemble_calls.tick(started)
            self._closing.wait(max(0.0, CHECK_INTERVAL_S - (time.monotonic() - started)))


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
