"""An ensemble's answers leave through the `answer` model, whose instances are processes of their own.

A response takes the Python stub a tenth of a millisecond of its interpreter, and the Triton server takes another third
of one to let go of it. The scheduler's interpreter is one for all streams; so it only says what is to be sent.

    the scheduler   AnswerSteps --Send, SendError, End--> answer-INSTANCE    the `answer` model: answer_model.py
                    AnswerSteps <--Started, StepEnded, Failed-- answers

What has been sent the scheduler hears as it does from the OpenAI front (handover.py).
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
import zmq

from ensemble.errors import DistServeError
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
    decode_from_answer,
    encode,
)
from ensemble.serving.run_dir import answer_address, answers_address, run_dir
from ensemble.serving.streams import Outputs
from ensemble.threads import start_vital_thread

MAX_QUEUED = 100_000  # messages to an instance that stands still, until the server is started again for that
CLOSING_S = 0.1  # in which the thread looks whether it is to end


class OnStep(Protocol):
    """What is done about a step that has started for this request, or the first of its choices."""

    def __call__(self, request_id: int, step: "AnswerStep", is_cancelled: bool) -> None: ...


class AnswerStep:
    """One execution of the `answer` model. Its methods may be called from any thread, and never wait."""

    def __init__(self, steps: "AnswerSteps", instance: int, number: int) -> None:
        self._steps, self._instance, self._number = steps, instance, number

    def send(self, outputs: Outputs, final: bool) -> None:
        """A `response_handle` among the outputs is told when the response has been sent, and is not sent itself."""
        handle = outputs.get("response_handle")
        request_id, number = (0, 0) if handle is None else handle.tolist()
        tensors = [to_tensor(name, array) for name, array in outputs.items() if array is not handle]
        message = Send(step=self._number, tensors=tensors, final=final, request_id=request_id, number=number)
        self._steps.tell(self._instance, message)

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

    def __init__(self, on_step: OnStep, on_failure: Callable[[int], None]) -> None:
        """`on_failure(request_id)`: a response of this request's step could not be sent."""
        self._on_step, self._on_failure = on_step, on_failure
        self._context = zmq.Context()
        self._from_answers = self._context.socket(zmq.PULL)
        self._from_answers.rcvtimeo = round(1e3 * CLOSING_S)
        self._from_answers.bind(answers_address(run_dir()))
        self._lock = threading.Lock()  # of what follows
        self._instances: dict[int, zmq.Socket[bytes]] = {}  # by their numbers
        self._ending: dict[tuple[int, int], Callable[[], None]] = {}  # (instance, step) |-> is told
        self._closing = threading.Event()
        self._thread = start_vital_thread(self._run, "answer-steps")

    def tell(self, instance: int, message: Send | SendError | End) -> None:
        """Raises zmq.Again if the instance takes nothing any more."""
        encoded = encode(message)
        with self._lock:
            if not self._closing.is_set():
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
            self._closing.set()
            for socket in self._instances.values():
                socket.close(linger=1000)
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():  # else the Triton server does not take a ping, and the process ends with it
            self._from_answers.close(linger=0)
            self._context.term()

    # ---- its thread

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with contextlib.suppress(zmq.Again):
                    self._receive(decode_from_answer(self._from_answers.recv()))
            except Exception:  # of one step: it harms no other
                log_exception()

    def _receive(self, message: FromAnswer) -> None:
        match message:
            case Started():
                self._meet(message.instance)
                step = AnswerStep(self, message.instance, message.step)
                self._on_step(message.request_id, step, message.is_cancelled)
            case StepEnded():
                self._ended(message.instance, message.step)
            case Failed():
                self._on_failure(message.request_id)

    def _meet(self, instance: int) -> None:
        with self._lock:
            if instance not in self._instances and not self._closing.is_set():
                socket = self._context.socket(zmq.PUSH)
                socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
                socket.connect(answer_address(run_dir(), instance))
                self._instances[instance] = socket

    def _ended(self, instance: int, number: int) -> None:
        with self._lock:
            on_ended = self._ending.pop((instance, number), None)
        if on_ended is not None:
            on_ended()
