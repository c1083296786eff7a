"""An ensemble's answers leave through the `answer` model, whose instances are processes of their own.

A response takes the Python stub a tenth of a millisecond of its interpreter, and the Triton server takes another third
of one to let go of it. The scheduler's interpreter is one for all streams; so it only says what is to be sent.

    the scheduler   AnswerSteps --Send, End--> answer-INSTANCE    the `answer` model: answers.py
                    AnswerSteps <--Started, Ended, Failed-- answers

What has been sent the scheduler hears as it does from the OpenAI front (handover.py).
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
import zmq

from ensemble.errors import DistServeError
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
    decode_from_answer,
    encode,
)
from ensemble.serving.run_dir import answer_address, answers_address, run_dir
from ensemble.serving.streams import Outputs
from ensemble.threads import start_vital_thread

MAX_QUEUED = 100_000  # messages to an instance: one response of each stream, an end of each ping


class OnStep(Protocol):
    """What is done about an execution of the model that has started."""

    def __call__(self, handle: str, step: "AnswerStep", is_cancelled: bool) -> None: ...


class AnswerStep:
    """One execution of the `answer` model. Its methods may be called from any thread, and never wait."""

    def __init__(self, steps: "AnswerSteps", instance: int, number: int) -> None:
        self._steps, self._instance, self._number = steps, instance, number

    def send(self, outputs: Outputs, final: bool) -> None:
        """Of a paced stream: `response_handle` comes back when the response has been sent, and is not sent itself."""
        handle = outputs.pop("response_handle", None)
        tensors = [to_tensor(name, array) for name, array in outputs.items()]
        text = "" if handle is None else handle.item(0).decode()
        self._steps.tell(self._instance, Send(step=self._number, tensors=tensors, final=final, handle=text))

    def send_error(self, error: DistServeError) -> None:
        self._steps.tell(self._instance, SendError(step=self._number, code=error.code, message=str(error)))

    def end(self, on_ended: Callable[[], None]) -> None:
        """Without a response; `on_ended` is called when the server has been told, or cannot be."""
        self._steps.end(self._instance, self._number, on_ended)


def to_tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    """`array`: of numbers, or of bytes as objects."""
    if array.dtype == object:
        return Tensor(name, "", list(array.shape), [bytes(each) for each in array.flat])
    return Tensor(name, array.dtype.str, list(array.shape), array.tobytes())


class AnswerSteps:
    """The scheduler's end. `on_step` and `on_failure` are called on a thread of its own."""

    def __init__(self, on_step: OnStep, on_failure: Callable[[str], None]) -> None:
        """`on_failure(handle)`: a response to this request could not be sent."""
        self._on_step, self._on_failure = on_step, on_failure
        self._context = zmq.Context()
        self._from_answers = self._context.socket(zmq.PULL)
        self._from_answers.bind(answers_address(run_dir()))
        self._lock = threading.Lock()  # of what follows
        self._instances: dict[int, zmq.Socket[bytes]] = {}  # by process id
        self._ending: dict[tuple[int, int], Callable[[], None]] = {}  # (instance, step) |-> is told
        self._is_closed = False
        self._thread = start_vital_thread(self._run, "answer-steps")

    def tell(self, instance: int, message: Send | SendError | End) -> None:
        """Raises zmq.Again if the instance takes nothing any more."""
        encoded = encode(message)
        with self._lock:
            if not self._is_closed:
                self._instances[instance].send(encoded, zmq.NOBLOCK)

    def end(self, instance: int, number: int, on_ended: Callable[[], None]) -> None:
        with self._lock:
            self._ending[instance, number] = on_ended
        try:
            self.tell(instance, End(step=number))
        except zmq.Again:
            log_exception()
            self._ended(instance, number)

    def close(self) -> None:
        """What was told still goes out."""
        with self._lock:
            self._is_closed = True
            for socket in self._instances.values():
                socket.close(linger=1000)
        self._context.term()  # the thread closes its socket
        self._thread.join(timeout=1.0)

    # ---- its thread

    def _run(self) -> None:
        try:
            while True:
                message = self._from_answers.recv()
                try:
                    self._receive(decode_from_answer(message))
                except Exception:  # of one step: it harms no other
                    log_exception()
        except zmq.ContextTerminated:
            self._from_answers.close(linger=0)

    def _receive(self, message: FromAnswer) -> None:
        match message:
            case Started():
                self._meet(message.instance)
                step = AnswerStep(self, message.instance, message.step)
                self._on_step(message.handle, step, message.is_cancelled)
            case Ended():
                self._ended(message.instance, message.step)
            case Failed():
                self._on_failure(message.handle)

    def _meet(self, instance: int) -> None:
        with self._lock:
            if instance not in self._instances and not self._is_closed:
                socket = self._context.socket(zmq.PUSH)
                socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
                socket.connect(answer_address(run_dir(), instance))
                self._instances[instance] = socket

    def _ended(self, instance: int, number: int) -> None:
        with self._lock:
            on_ended = self._ending.pop((instance, number), None)
        if on_ended is not None:
            on_ended()
