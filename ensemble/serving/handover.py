"""What `postprocess` and the OpenAI front tell the scheduler: which responses they have handed over.

And `postprocess` whose client is gone.

It imports little: each instance of `postprocess` is a process of its own.
"""

import contextlib
from collections.abc import Iterable

import zmq

from ensemble.serving.marks import CancelHandle
from ensemble.serving.run_dir import cancel_address, run_dir

PASSED, CANCELLED = "passed", "cancelled"  # the HTTP relay tells, on the same socket, a tag alone
SEND_TIMEOUT_MS = 100  # a number that is lost costs its stream the rest of a second (pacing.py)


class HandOver:
    """A sender's end, on its one thread."""

    def __init__(self, send_timeout_ms: int = SEND_TIMEOUT_MS) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndtimeo = send_timeout_ms
        self._socket.connect(cancel_address(run_dir()))

    def done(self, handle: CancelHandle, is_cancelled: bool) -> None:
        """The response with this handle has been handed over."""
        with contextlib.suppress(zmq.Again):  # nobody takes it
            if is_cancelled:
                self._socket.send(f"{CANCELLED} {handle.request_id}".encode())
        self.passed([handle])

    def passed(self, handles: Iterable[CancelHandle]) -> None:
        """The responses with these handles have been handed over."""
        numbers = "".join(f" {handle.request_id} {handle.number}" for handle in handles)
        with contextlib.suppress(zmq.Again):
            self._socket.send(f"{PASSED}{numbers}".encode())

    def close(self) -> None:
        self._context.destroy(linger=0)
