"""What `postprocess` tells the scheduler: which responses it has handed over, and whose client is gone.

It imports little: each instance of `postprocess` is a process of its own.
"""

import contextlib

import zmq

from ensemble.serving.marks import CancelHandle
from ensemble.serving.run_dir import cancel_address, run_dir

PASSED, CANCELLED = "passed", "cancelled"  # the HTTP relay tells, on the same socket, a tag alone
SEND_TIMEOUT_MS = 100  # a number that is lost costs its stream the rest of a second (pacing.py)


class HandOver:
    """An instance's end, on its one thread."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndtimeo = SEND_TIMEOUT_MS
        self._socket.connect(cancel_address(run_dir()))

    def done(self, handle: CancelHandle, is_cancelled: bool) -> None:
        """The response with this handle has been handed over."""
        with contextlib.suppress(zmq.Again):  # nobody takes it
            if is_cancelled:
                self._socket.send(f"{CANCELLED} {handle.request_id}".encode())
            self._socket.send(f"{PASSED} {handle.request_id} {handle.number}".encode())

    def close(self) -> None:
        self._context.destroy(linger=0)
