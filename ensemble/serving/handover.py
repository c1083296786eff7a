"""What the OpenAI front and the `answer` model tell the scheduler: which responses have left (pacing.py)."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import zmq

from ensemble.serving.run_dir import cancel_address, run_dir

PASSED = "passed"  # begins a message; the HTTP relay tells, on the same socket, the tag of a client that has gone


class ResponseHandle(NamedTuple):
    """Of one response."""

    request_id: int
    number: int  # of the response in its stream (pacing.py)


class HandOver:
    """A sender's end, on its one thread."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndtimeo = 0  # its thread serves every stream of the front
        self._socket.connect(cancel_address(run_dir()))

    def passed(self, handles: Iterable[ResponseHandle]) -> None:
        """The responses with these handles have been handed over."""
        numbers = "".join(f" {handle.request_id} {handle.number}" for handle in handles)
        with contextlib.suppress(zmq.Again):  # nobody takes it: it costs the streams the rest of a second (pacing.py)
            self._socket.send(f"{PASSED}{numbers}".encode())

    def close(self) -> None:
        self._context.destroy(linger=0)
