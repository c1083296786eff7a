"""What an instance of the `answer` model does: sends its clients what the scheduler says (answer_steps.py).

One thread sends; what comes meanwhile waits in the socket, one response of a stream at most (pacing.py).
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zmq

from ensemble.errors import DistServeError, ErrorCode, InternalError
from ensemble.operator_log import log_exception
from ensemble.protocol.answers import (
    End,
    Ended,
    Failed,
    FromAnswer,
    Send,
    SendError,
    Started,
    Tensor,
    ToAnswer,
    decode_to_answer,
    encode,
)
from ensemble.serving.handover import HandOver
from ensemble.serving.marks import ResponseHandle, read_response_handle
from ensemble.serving.run_dir import answer_address, answers_address, run_dir
from ensemble.threads import start_vital_thread

MAX_QUEUED = 100_000  # messages to the scheduler: two of each step that starts
MAX_TOGETHER = 8  # responses, after which the scheduler is told that they have been sent


class Step(Protocol):
    """One execution of the model, as its shell offers it."""

    def send(self, outputs: dict[str, npt.NDArray[Any]], final: bool) -> None: ...

    def send_error(self, error: DistServeError) -> None: ...

    def end(self) -> None: ...


class _Told(DistServeError):
    """An error of the scheduler's."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Answers:
    """`started` may be called from any thread."""

    def __init__(self, instance: int | None = None) -> None:
        """`instance`: another number for each of a server's; default: the process id."""
        self._instance = os.getpid() if instance is None else instance
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # the sender's bound holds
        self._socket.bind(answer_address(run_dir(), self._instance))
        self._scheduler = self._context.socket(zmq.PUSH)
        self._scheduler.setsockopt(zmq.SNDHWM, MAX_QUEUED)
        self._scheduler.connect(answers_address(run_dir()))
        self._hand_over = HandOver()
        self._lock = threading.Lock()  # of what follows, and of the socket to the scheduler
        self._steps: dict[int, tuple[Step, str]] = {}  # number |-> is open, and its handle
        self._num_steps = 0
        self._thread = start_vital_thread(self._run, "answers")

    def started(self, handle: str, step: Step, is_cancelled: bool) -> None:
        with self._lock:
            number = self._num_steps
            self._num_steps += 1
            self._steps[number] = step, handle
        self._tell(Started(instance=self._instance, step=number, handle=handle, is_cancelled=is_cancelled))

    def close(self) -> None:
        with self._lock:
            self._scheduler.close(linger=0)
        self._context.term()  # the thread closes its socket
        self._thread.join(timeout=1.0)
        self._hand_over.close()

    def _tell(self, message: FromAnswer) -> None:
        with self._lock, contextlib.suppress(zmq.ZMQError):  # it is closed; or nobody takes it, and the server ends
            self._scheduler.send(encode(message), zmq.NOBLOCK)

    # ---- its thread

    def _run(self) -> None:
        sent: list[ResponseHandle] = []
        try:
            while True:
                self._take(self._socket.recv(), sent)
                with contextlib.suppress(zmq.Again):
                    while len(sent) < MAX_TOGETHER:
                        self._take(self._socket.recv(zmq.NOBLOCK), sent)
                if sent:
                    self._hand_over.passed(sent)
                    sent.clear()
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def _take(self, encoded: bytes, sent: list[ResponseHandle]) -> None:
        try:
            self._do(decode_to_answer(encoded), sent)
        except Exception:  # of one step: it harms no other
            log_exception()

    def _do(self, message: ToAnswer, sent: list[ResponseHandle]) -> None:
        with self._lock:
            found = self._steps.get(message.step)
            if not isinstance(message, Send) or message.final:
                self._steps.pop(message.step, None)
        if found is None:  # it has ended
            return
        step, handle = found
        match message:
            case Send():
                outputs = {tensor.name: to_array(tensor) for tensor in message.tensors}
                self._send(handle, lambda: step.send(outputs, message.final), step if message.final else None)
                passed = read_response_handle(message.handle) if message.handle else None
                if passed is not None:
                    sent.append(passed)
            case SendError():
                error = _Told(message.code, message.message)
                self._send(handle, lambda: step.send_error(error), None)
            case End():
                with contextlib.suppress(Exception):  # of the Triton server
                    step.end()
                self._tell(Ended(instance=self._instance, step=message.step))

    def _send(self, handle: str, send: Callable[[], None], ends: Step | None) -> None:
        """`ends`: the step, if this is its final response: nobody else would tell its client of a failure."""
        try:
            send()
        except Exception as error:
            log_exception()
            if ends is not None:
                with contextlib.suppress(Exception):  # the server takes no answer any more
                    ends.send_error(InternalError(f"the answer could not be sent: {error}"))
            self._tell(Failed(handle=handle))


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    if isinstance(tensor.data, list):
        array = np.empty(len(tensor.data), dtype=object)
        array[:] = tensor.data
        return array.reshape(tensor.shape)
    # A copy: the stub takes no array that cannot be written.
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype)).reshape(tensor.shape).copy()
