"""A request of an ensemble: its steps end in the order that makes the answer's last response the ensemble's last."""

import gc
import random
import time
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from ensemble.errors import Cancelled, DistServeError
from ensemble.serving.ensemble_calls import (
    LATE_S,
    LOST_S,
    MAX_PINGS,
    PING_S,
    TOLD_PING_S,
    EnsembleCall,
    EnsembleCalls,
)
from ensemble.serving.marks import read_stream_handle
from ensemble.serving.streams import Outputs


class Ensemble:
    """What the Triton server does with two steps: each handle of the first starts the second anew, in one of as many
    processes as there are queues; without any, what is said to a step is done at once."""

    def __init__(self, *queues: deque[Callable[[], None]]) -> None:
        self.queues = queues
        self.num_open = 0
        self.starts: deque[tuple[str, Step]] = deque()  # not yet executed
        self.first = Step(self)
        self.seen: list[tuple[str, bool]] = []  # what the client got, and whether it was the last
        self.fails = False  # the next send

    def start(self, handle: str) -> None:
        self.starts.append((handle, Step(self, random.choice(self.queues) if self.queues else None)))

    def deliver(self, text: str) -> None:
        assert not any(is_last for _, is_last in self.seen), "a response after the last"
        self.seen.append((text, self.num_open == 0))


class Step:
    """One execution of a model; with a queue what it is told is done later."""

    request_id, parameters = "", "{}"

    def __init__(self, ensemble: Ensemble, queue: deque[Callable[[], None]] | None = None) -> None:
        self.ensemble, self.is_open, self.queue = ensemble, True, queue
        ensemble.num_open += 1

    def send(self, outputs: Outputs, final: bool) -> None:
        self._do(lambda: self._send(outputs, final))

    def send_error(self, error: DistServeError) -> None:
        self._do(lambda: self._send_error(error))

    def end(self, on_ended: Callable[[], None] = lambda: None) -> None:
        self._do(lambda: self._close(True), on_ended)

    def is_cancelled(self) -> bool:
        return False

    def _do(self, *actions: Callable[[], None]) -> None:
        if self.queue is not None:
            self.queue.extend(actions)
            return
        for action in actions:
            action()

    def _send(self, outputs: Outputs, final: bool) -> None:
        assert self.is_open, "a step that has ended"
        if "stream_handle" in outputs:
            if self.ensemble.fails:
                self.ensemble.fails = False
                raise RuntimeError("the server refuses")
            self.ensemble.start(outputs["stream_handle"][0].decode())
            return
        if self.ensemble.fails:  # before the server has counted the response: after that it takes no other
            self.ensemble.fails = False
            raise RuntimeError("the server refuses")
        self._close(final)
        self.ensemble.deliver(outputs["text_output"][0].decode())

    def _send_error(self, error: DistServeError) -> None:
        self._close(True)
        assert self.ensemble.num_open == 0, "the server would never release the request"
        self.ensemble.deliver(str(error))

    def _close(self, final: bool) -> None:
        assert self.is_open, "a step that has ended"
        self.is_open = not final
        self.ensemble.num_open -= final


class Request:
    """One of the ensemble's, and its stream."""

    def __init__(
        self,
        *request_ids: int,
        is_told: bool = False,
        calls: EnsembleCalls | None = None,
        queues: list[deque[Callable[[], None]]] | None = None,
    ) -> None:
        self.ensemble, self.has_started = Ensemble(*(queues or [])), False
        self.cancelled: list[int] = []
        self.calls = calls or EnsembleCalls(self.cancelled.append)
        self.call = EnsembleCall(self.ensemble.first, is_told)
        self.calls.begin(self.call, list(request_ids or (7,)), self._start)

    def execute(self, is_cancelled: bool = False) -> None:
        """The model does, one step that has been started."""
        handle, step = self.ensemble.starts.popleft()
        request_id = read_stream_handle(handle)
        assert request_id is not None, "the scheduler signs it"
        self.calls.started(request_id, step, is_cancelled)

    def _start(self) -> None:
        assert not self.has_started
        self.has_started = True


def text(value: str) -> Outputs:
    return {"text_output": np.array([value.encode()], dtype=object)}


@pytest.mark.parametrize("seed", range(300))
def test_the_client_gets_all_in_order_and_the_end_with_the_last_response(seed: int) -> None:
    """Whatever comes first: steps that start late, pings under way, an error for an end, slow processes."""
    rng = random.Random(seed)
    random.seed(seed)
    queues: list[deque[Callable[[], None]]] = [deque() for _ in range(rng.randrange(4))]
    request = Request(is_told=rng.random() < 0.3, queues=queues)
    ensemble, now, late_at = request.ensemble, time.monotonic(), 0.0
    words = [str(index) for index in range(rng.randrange(1, 12))]
    todo = deque(words)
    while todo or ensemble.starts or any(queues):
        action = rng.random()
        if rng.random() < 0.5 and any(queues):
            rng.choice([queue for queue in queues if queue]).popleft()()
            continue
        if action < 0.4 and todo and request.has_started:
            word = todo.popleft()
            if not todo and rng.random() < 0.3:
                request.call.send_error(Cancelled(word))
            else:
                request.call.send(text(word), final=not todo)
        elif action < 0.7 and ensemble.starts:
            request.execute()
        elif not (ensemble.starts or any(queues)) or now < late_at:
            now += PING_S
            late_at = late_at if ensemble.starts or any(queues) else now + LATE_S - PING_S
            request.calls.tick(now)
    assert [each.split(": ")[-1] for each, _ in ensemble.seen] == words
    assert [is_last for _, is_last in ensemble.seen] == [False] * (len(words) - 1) + [True]
    assert ensemble.num_open == 0
    assert request.call.is_ended
    request.calls.tick(now + 60)
    assert not ensemble.starts, "what has ended is pinged no more"


def test_an_error_before_the_answers_step_ends_the_request_at_once() -> None:
    ensemble = Ensemble()
    call = EnsembleCall(ensemble.first, is_told=False)
    call.send_error(Cancelled("refused"))
    call.begin([7], lambda: None)
    assert [is_last for _, is_last in ensemble.seen] == [True]
    assert not ensemble.starts


def test_a_cancel_is_seen_by_the_next_step_that_starts_and_told_of_each_request() -> None:
    request = Request(7, 8)
    request.execute()
    request.calls.tick(time.monotonic() + PING_S)
    assert request.cancelled == []
    request.execute(is_cancelled=True)
    assert request.cancelled == [7, 8]


def test_pings_have_a_bound_and_reach_every_request_in_turn() -> None:
    """Beside those that need none: of clients of the relay, or whose answer's step has not started."""
    calls = EnsembleCalls(lambda request_id: None)
    for request_id in range(1, 3 * MAX_PINGS):
        Request(request_id, calls=calls)
        Request(1000 + request_id, calls=calls, is_told=True).execute()
    now = time.monotonic() + TOLD_PING_S - 1  # the relay's are not due yet
    started = [Request(2000 + index, calls=calls) for index in range(3 * MAX_PINGS)]
    for request in started:
        request.execute()
    for turn in range(1, 4):
        calls.tick(now)
        assert sum(len(request.ensemble.starts) for request in started) == turn * MAX_PINGS
    assert all(len(request.ensemble.starts) == 1 for request in started)


def test_a_client_of_the_relay_is_looked_after_too_but_seldom() -> None:
    request = Request(is_told=True)
    request.execute()
    now = time.monotonic()
    request.calls.tick(now + TOLD_PING_S - 1)
    assert not request.ensemble.starts
    request.calls.tick(now + TOLD_PING_S + 0.1)
    assert len(request.ensemble.starts) == 1


def test_a_late_ping_holds_up_an_end_for_a_second_but_an_error_until_it_has_come() -> None:
    request = Request()
    request.execute()
    now = time.monotonic() + PING_S
    request.calls.tick(now)
    request.call.send(text("all"), final=True)
    assert request.ensemble.seen == []
    request.calls.tick(now + LATE_S + 0.1)
    assert [each for each, _ in request.ensemble.seen] == ["all"]

    request, now = Request(), time.monotonic() + 2 * PING_S
    request.execute()
    request.calls.tick(now)
    request.call.send_error(Cancelled("gone"))
    request.calls.tick(now + LATE_S + 0.1)
    assert request.ensemble.seen == []
    request.execute()
    assert [is_last for _, is_last in request.ensemble.seen] == [True]


def test_a_request_whose_answers_step_never_starts_is_given_up() -> None:
    request = Request()
    request.ensemble.starts.popleft()[1].end()  # as with a client of `scheduler` that shows a mark of `preprocess`
    request.calls.tick(time.monotonic() + LOST_S + 0.1)
    assert request.cancelled == [7]
    assert len(request.ensemble.seen) == 1 and "does not start" in request.ensemble.seen[0][0]


def test_an_answer_that_cannot_be_sent_ends_with_an_error() -> None:
    request = Request()
    request.execute()
    request.ensemble.fails = True
    with pytest.raises(RuntimeError):
        request.call.send(text("all"), final=True)
    request.call.send_error(Cancelled("as the sender does"))
    assert [is_last for _, is_last in request.ensemble.seen] == [True]
    assert request.ensemble.num_open == 0


def test_a_request_of_which_a_response_was_lost_is_cancelled() -> None:
    request = Request(7, 8)
    request.calls.failed(8)
    assert request.cancelled == []
    request.calls.failed(7)
    assert request.cancelled == [7, 8]


def test_a_server_that_stops_lets_answers_end_without_the_pings_that_will_not_come() -> None:
    request = Request()
    request.execute()
    request.calls.tick(time.monotonic() + PING_S)
    request.ensemble.starts.popleft()[1].end()
    request.calls.close()
    request.call.send_error(Cancelled("stopping"))
    assert [is_last for _, is_last in request.ensemble.seen] == [True]


def test_those_that_are_to_be_pinged_seldom_do_not_keep_the_others_waiting() -> None:
    calls = EnsembleCalls(lambda request_id: None)
    told = [Request(index, calls=calls, is_told=True) for index in range(1, 12 * MAX_PINGS)]
    own = [Request(10_000 + index, calls=calls) for index in range(MAX_PINGS // 5)]
    for request in [*told, *own]:
        request.execute()
    now, num_pings = time.monotonic() + TOLD_PING_S, 0
    for _ in range(20):
        now += 0.1
        calls.tick(now)
        num_pings += sum(len(request.ensemble.starts) for request in own)
        for request in [*told, *own]:
            if request.ensemble.starts:
                request.execute()
    assert num_pings > 20 * 0.1 / PING_S * len(own) / 4, "each at least every fourth time"


def test_a_ping_that_cannot_be_sent_is_followed_by_another_and_holds_up_nothing() -> None:
    request, interval_s = Request(), 1.001 * PING_S  # a sum of times may round to less than an interval
    request.execute()
    now = time.monotonic() + interval_s
    request.ensemble.fails = True
    request.calls.tick(now)
    assert not request.ensemble.starts
    request.calls.tick(now + interval_s)
    assert len(request.ensemble.starts) == 1
    request.execute()
    request.ensemble.fails = True
    request.calls.tick(now + 2 * interval_s)
    request.call.send_error(Cancelled("gone"))
    assert [is_last for _, is_last in request.ensemble.seen] == [True]


def test_a_request_whose_answers_step_cannot_be_started_gets_an_error() -> None:
    ensemble, cancelled = Ensemble(), []
    ensemble.fails = True
    call = EnsembleCall(ensemble.first, is_told=False)
    EnsembleCalls(cancelled.append).begin(call, [7], lambda: None)
    assert cancelled == [7]
    assert [is_last for _, is_last in ensemble.seen] == [True]


def test_a_request_that_has_ended_is_gone_without_the_collector_of_cycles() -> None:
    class Stream:
        call: EnsembleCall

    calls, ensemble, stream = EnsembleCalls(lambda request_id: None), Ensemble(), Stream()
    stream.call = EnsembleCall(ensemble.first, is_told=False)
    calls.begin(stream.call, [7], lambda stream=stream: None)  # type: ignore[misc]
    calls.started(7, ensemble.starts.popleft()[1], is_cancelled=False)
    stream.call.send(text("all"), final=True)
    calls.tick(time.monotonic())
    is_there = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert is_there() is None
    finally:
        gc.enable()
