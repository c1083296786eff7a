"""What an instance of the `answer` model does: sends its clients what the scheduler says (answer_steps.py).

One thread sends. What comes meanwhile waits in the process's memory: one response of each stream (pacing.py), and those
that are given up after most of a second.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zmq

from ensemble.errors import DistServeError, ErrorCode, InternalError, InvalidRequest
from ensemble.operator_log import log_exception
from ensemble.protocol.scheduler_answer import (
    End,
    Failed,
    FromAnswer,
    Send,
    SendError,
    Started,
    StepEnded,
    Tensor,
    ToAnswer,
    decode_to_answer,
    encode,
)
from ensemble.serving.handover import HandOver, ResponseHandle
from ensemble.serving.marks import read_stream_handle
from ensemble.serving.run_dir import answer_address, answers_address, run_dir
from ensemble.threads import start_vital_thread

MAX_QUEUED = 100_000  # messages to the scheduler: two of each step that starts
MAX_TOGETHER = 8  # messages, after which the scheduler is told of the responses that have been sent
MAX_HANDLE_BYTES = 200
CLOSING_S = 0.1  # in which the thread looks whether it is to end


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


class _Open:
    """A step that has not ended."""

    def __init__(self, step: Step, request_id: int) -> None:
        self.step, self.request_id = step, request_id
        # Of a response: the answer has a hole, and must not end as if it had none.
        self.failure: Exception | None = None


class AnswerModel:
    """`started` may be called from any thread."""

    def __init__(self, instance: int | None = None) -> None:
        """`instance`: another number for each of a server's; default: the process id."""
        self._instance = os.getpid() if instance is None else instance
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.rcvtimeo = round(1e3 * CLOSING_S)
        self._socket.bind(answer_address(run_dir(), self._instance))
        self._scheduler = self._context.socket(zmq.PUSH)
        self._scheduler.setsockopt(zmq.SNDHWM, MAX_QUEUED)
        self._scheduler.connect(answers_address(run_dir()))
        self._hand_over = HandOver()
        self._lock = threading.Lock()  # of what follows, and of the socket to the scheduler
        self._steps: dict[int, _Open] = {}  # by number
        self._num_steps = 0
        self._closing = threading.Event()
        self._thread = start_vital_thread(self._run, "answers")

    def started(self, handle: str, step: Step, is_cancelled: bool) -> None:
        request_id = read_stream_handle(handle) if len(handle) <= MAX_HANDLE_BYTES else None
        if request_id is None:
            step.send_error(InvalidRequest("stream_handle", handle[:64], "this model is for the ensembles alone"))
            return
        with self._lock:
            number = self._num_steps
            self._num_steps += 1
            self._steps[number] = _Open(step, request_id)
        self._tell(Started(instance=self._instance, step=number, request_id=request_id, is_cancelled=is_cancelled))

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():  # else the Triton server does not take a response, and the process ends with it
            with self._lock:
                self._context.destroy(linger=0)
            self._hand_over.close()

    def _tell(self, message: FromAnswer) -> None:
        with self._lock, contextlib.suppress(zmq.ZMQError):  # it is closed; or nobody takes it, and the server ends
            self._scheduler.send(encode(message), zmq.NOBLOCK)

    # ---- its thread

    def _run(self) -> None:
        sent: list[ResponseHandle] = []
        while not self._closing.is_set():
            with contextlib.suppress(zmq.Again):
                self._take(self._socket.recv(), sent)
                for _ in range(MAX_TOGETHER - 1):
                    self._take(self._socket.recv(zmq.NOBLOCK), sent)
            if sent:
                self._hand_over.passed(sent)
                sent.clear()

    def _take(self, encoded: bytes, sent: list[ResponseHandle]) -> None:
        try:
            self._do(decode_to_answer(encoded), sent)
        except Exception:  # a fault of ours: it harms no other step
            log_exception()

    def _do(self, message: ToAnswer, sent: list[ResponseHandle]) -> None:
        with self._lock:
            is_last = not isinstance(message, Send) or message.final
            found = self._steps.pop(message.step, None) if is_last else self._steps.get(message.step)
        match message:
            case Send() if found is not None:
                if self._has_sent(found, message) and message.number:
                    sent.append(ResponseHandle(message.request_id, message.number))
            case SendError() if found is not None:
                self._try(found, lambda: found.step.send_error(_Told(message.code, message.message)))
            case End():
                if found is not None:
                    self._try(found, found.step.end)
                self._tell(StepEnded(instance=self._instance, step=message.step))

    def _has_sent(self, found: _Open, message: Send) -> bool:
        if found.failure is None:
            self._try(
                found, lambda: found.step.send({each.name: to_array(each) for each in message.tensors}, message.final)
            )
        failure = found.failure
        if failure is not None and message.final:
            error = InternalError(f"the answer could not be sent: {failure}")
            self._try(found, lambda: found.step.send_error(error))
        return failure is None

    def _try(self, found: _Open, send: Callable[[], None]) -> None:
        """The Triton server takes no answer any more, or ours is faulty."""
        try:
            send()
        except Exception as error:
            log_exception()
            found.failure = error
            self._tell(Failed(request_id=found.request_id))


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    if isinstance(tensor.data, list):
        array = np.empty(len(tensor.data), dtype=object)
        array[:] = tensor.data
        return array.reshape(tensor.shape)
    # A copy: the stub takes no array that cannot be written.
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype)).reshape(tensor.shape).copy()
