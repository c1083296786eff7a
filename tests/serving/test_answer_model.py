"""What the scheduler says to instances of the `answer` model is what their clients get, over the sockets of a run."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zmq

from ensemble.errors import Cancelled, DistServeError
from ensemble.protocol.scheduler_answer import Send, Tensor
from ensemble.serving.answer_model import MAX_HANDLE_BYTES, AnswerModel
from ensemble.serving.answer_steps import AnswerStep, AnswerSteps
from ensemble.serving.marks import stream_handle
from ensemble.serving.run_dir import RUN_DIR_VARIABLE, cancel_address

Said = queue.SimpleQueue[tuple[Any, ...]]
TIMEOUT_S = 5.0


class TritonStep:
    """What the Triton server is told of one execution."""

    def __init__(self) -> None:
        self.said: Said = queue.SimpleQueue()
        self.fails = False

    def send(self, outputs: dict[str, npt.NDArray[Any]], final: bool) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("the server refuses")
        self.said.put(("response", outputs, final))

    def send_error(self, error: DistServeError) -> None:
        self.said.put(("error", error.code, str(error)))

    def end(self) -> None:
        self.said.put(("end",))

    def next(self) -> tuple[Any, ...]:
        return self.said.get(timeout=TIMEOUT_S)


class Run:
    """The scheduler and two instances."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.cancels = self.context.socket(zmq.PULL)
        self.cancels.rcvtimeo = int(1e3 * TIMEOUT_S)
        self.cancels.bind(cancel_address(folder))
        self.started: queue.SimpleQueue[tuple[int, AnswerStep, bool]] = queue.SimpleQueue()
        self.failed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.scheduler = AnswerSteps(lambda *what: self.started.put(what), self.failed.put)
        self.instances = [AnswerModel(1), AnswerModel(2)]

    def start(self, request_id: int = 7, is_cancelled: bool = False, at: int = 0) -> tuple[TritonStep, AnswerStep]:
        step = TritonStep()
        self.instances[at].started(stream_handle(request_id), step, is_cancelled)
        told, answer, cancelled = self.started.get(timeout=TIMEOUT_S)
        assert (told, cancelled) == (request_id, is_cancelled)
        return step, answer

    def close(self) -> None:
        self.scheduler.close()
        for instance in self.instances:
            instance.close()
        self.context.destroy(linger=0)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("r")
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    run = Run(folder)
    yield run
    run.close()


def text(value: str) -> dict[str, npt.NDArray[Any]]:
    return {"text_output": np.array([value.encode()], dtype=object)}


def test_a_response_has_its_tensors_as_they_were_and_nothing_of_its_handle(run: Run) -> None:
    step, answer = run.start()
    outputs: dict[str, npt.NDArray[Any]] = {
        "text_output": np.array([b"half \xc3", b""], dtype=object),
        "num_output_tokens": np.array([3], np.int32),
        "vllm_num_input_tokens": np.array([2**32 - 1], np.uint32),
        "arrival_time_ns": np.array([2**62], np.int64),
        "output_log_probs": np.array([[-0.5, -np.inf, 0.0]], np.float32),
        "output_ids": np.array([], np.int32),
    }
    answer.send({**outputs, "response_handle": np.array([7, 3], np.int64)}, final=False)
    kind, got, final = step.next()
    assert (kind, final, got.keys()) == ("response", False, outputs.keys())
    for name, array in outputs.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tolist() == array.tolist(), name
        assert got[name].flags.writeable, name  # the stub takes no others
    assert run.cancels.recv() == b"passed 7 3"


def test_responses_keep_their_order_and_the_last_one_ends_the_step(run: Run) -> None:
    step, answer = run.start()
    words = [str(index) for index in range(100)]
    for word in words:
        answer.send(text(word), final=word == words[-1])
    answer.send(text("too late"), final=False)
    answer.send_error(Cancelled("too late"))
    got = [step.next() for _ in words]
    assert [outputs["text_output"][0].decode() for _, outputs, _ in got] == words
    assert [final for _, _, final in got] == [False] * 99 + [True]
    other, other_answer = run.start()
    other_answer.send_error(Cancelled("gone"))
    assert other.next()[:2] == ("error", "CANCELLED")
    assert step.said.empty()


def test_an_end_is_told_when_the_server_has_been(run: Run) -> None:
    """By either instance, and of the step that was meant."""
    ended: Said = queue.SimpleQueue()
    for at in (0, 1, 0):
        step, answer = run.start(is_cancelled=True, at=at)
        answer.end(lambda step=step: ended.put((step.said.get_nowait(),)))  # type: ignore[misc]
        assert ended.get(timeout=TIMEOUT_S) == (("end",),)


def test_one_instance_that_stands_still_holds_up_no_other(run: Run) -> None:
    slow, slow_answer = run.start(at=0)
    quick, quick_answer = run.start(at=1)
    go_on: queue.SimpleQueue[None] = queue.SimpleQueue()
    send: Callable[..., None] = slow.send
    slow.send = lambda outputs, final: (go_on.get(timeout=TIMEOUT_S), send(outputs, final))[1]  # type: ignore[method-assign]
    slow_answer.send(text("slow"), final=True)
    began = time.monotonic()
    for index in range(20):
        quick_answer.send(text(str(index)), final=index == 19)
    assert [quick.next()[1]["text_output"][0] for _ in range(20)] == [b"%d" % index for index in range(20)]
    assert time.monotonic() - began < TIMEOUT_S
    assert slow.said.empty()
    go_on.put(None)
    assert slow.next()[1]["text_output"][0] == b"slow"


@pytest.mark.parametrize("end", ["that one", "a later one", "an error"])
def test_an_answer_with_a_hole_ends_with_an_error(run: Run, end: str) -> None:
    """And the scheduler is told at once, but not that the lost response has left."""
    step, answer = run.start()
    step.fails = True
    answer.send({**text("lost"), "response_handle": np.array([7, 1], np.int64)}, final=end == "that one")
    assert run.failed.get(timeout=TIMEOUT_S) == 7
    if end == "a later one":
        answer.send(text("the rest"), final=False)
        answer.send({**text("."), "response_handle": np.array([7, 3], np.int64)}, final=True)
    elif end == "an error":
        answer.send_error(Cancelled("as the scheduler does then"))
    assert step.next()[:2] == ("error", "CANCELLED" if end == "an error" else "INTERNAL")
    assert step.said.empty()
    _other, other_answer = run.start(8)
    other_answer.send({**text("x"), "response_handle": np.array([8, 1], np.int64)}, final=False)
    assert run.cancels.recv() == b"passed 8 1"


def test_what_cannot_be_made_a_tensor_ends_the_answer_too(run: Run) -> None:
    step, _answer = run.start()
    run.scheduler.tell(1, Send(step=0, tensors=[Tensor("x", "<i4", [3], b"12")], final=True, request_id=7, number=1))
    assert step.next()[:2] == ("error", "INTERNAL")
    assert run.failed.get(timeout=TIMEOUT_S) == 7


@pytest.mark.parametrize("handle", ["", "stream 7", f"stream 7/{'0' * 64}", "x" * (MAX_HANDLE_BYTES + 1)])
def test_a_handle_that_nobody_signed_is_refused_on_the_spot(run: Run, handle: str) -> None:
    step = TritonStep()
    run.instances[0].started(handle, step, True)
    kind, code, message = step.said.get_nowait()
    assert (kind, code) == ("error", "INVALID_ARG")
    assert message.startswith("stream_handle = ") and "is not valid: this model is for the ensembles alone" in message
    time.sleep(0.05)
    assert run.started.empty()


def test_an_instance_whose_send_never_returns_can_be_closed(run: Run) -> None:
    step, answer = run.start()
    go_on: queue.SimpleQueue[None] = queue.SimpleQueue()
    ended: list[None] = []
    is_sending = threading.Event()

    def send(outputs: object, final: bool) -> None:
        is_sending.set()
        ended.append(go_on.get())

    step.send = send  # type: ignore[method-assign]
    answer.send(text("never"), final=True)
    assert is_sending.wait(TIMEOUT_S)
    run.instances[0].close()
    assert not ended, "it has returned before"
    go_on.put(None)


def test_an_unreadable_message_harms_no_other(run: Run) -> None:
    step, answer = run.start()
    for address in sorted(Path(run.cancels.last_endpoint.decode().removeprefix("ipc://")).parent.glob("answer*")):
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"ipc://{address}")
            socket.send(b"\x93nothing")
    time.sleep(0.1)
    answer.send(text("all"), final=True)
    assert step.next()[0] == "response"
    run.start()
