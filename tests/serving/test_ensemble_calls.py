"""A request of an ensemble: its steps end in the order that makes the answer's last response the ensemble's last."""

import random
import time
from collections import deque

import numpy as np
import pytest

from ensemble.errors import Cancelled, DistServeError, InvalidRequest
from ensemble.serving.ensemble_calls import LOST_S, MAX_PINGS, PING_S, START_S, EnsembleCall, EnsembleCalls
from ensemble.serving.streams import Outputs


class Ensemble:
    """What the Triton server does with two steps: each handle of the first starts the second anew."""

    def __init__(self) -> None:
        self.num_open = 0
        self.starts: deque[tuple[str, Step]] = deque()  # not yet executed
        self.first = Step(self)
        self.seen: list[tuple[str, bool]] = []  # what the client got, and whether it was the last

    def start(self, handle: str) -> None:
        self.starts.append((handle, Step(self)))

    def deliver(self, text: str) -> None:
        assert not any(is_last for _, is_last in self.seen), "a response after the last"
        self.seen.append((text, self.num_open == 0))


class Step:
    """One execution of the `scheduler` model."""

    request_id, parameters = "", "{}"

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble, self.is_open = ensemble, True
        ensemble.num_open += 1

    def send(self, outputs: Outputs, final: bool) -> None:
        self._close(final)
        if "stream_handle" in outputs:
            self.ensemble.start(outputs["stream_handle"][0].decode())
        else:
            self.ensemble.deliver(outputs["text_output"][0].decode())

    def send_error(self, error: DistServeError) -> None:
        self._close(True)
        self.ensemble.deliver(str(error))

    def end(self) -> None:
        self._close(True)

    def is_cancelled(self) -> bool:
        return False

    def _close(self, final: bool) -> None:
        assert self.is_open, "a step that has ended"
        self.is_open = not final
        self.ensemble.num_open -= final


def text(value: str) -> Outputs:
    return {"text_output": np.array([value.encode()], dtype=object)}


def begun(is_told: bool = False) -> tuple[Ensemble, EnsembleCalls, EnsembleCall]:
    ensemble, calls = Ensemble(), EnsembleCalls(lambda request_id: None)
    call = EnsembleCall(ensemble.first, is_told)
    calls.begin(call, [7])
    return ensemble, calls, call


def execute(ensemble: Ensemble, calls: EnsembleCalls, is_cancelled: bool = False) -> None:
    handle, step = ensemble.starts.popleft()
    calls.started(handle, step, is_cancelled)


@pytest.mark.parametrize("seed", range(300))
def test_the_client_gets_all_in_order_and_the_end_with_the_last_response(seed: int) -> None:
    """Whatever comes first: tokens before the step that carries them, pings under way, an error for an end."""
    rng = random.Random(seed)
    ensemble, calls, call = begun(is_told=rng.random() < 0.3)
    now = time.monotonic()
    words = [str(index) for index in range(rng.randrange(1, 12))]
    todo = deque(words)
    while todo or ensemble.starts:
        action = rng.random()
        if action < 0.4 and todo:
            word = todo.popleft()
            if not todo and rng.random() < 0.3:
                call.send_error(Cancelled(word))
            else:
                call.send(text(word), final=not todo)
        elif action < 0.7 and ensemble.starts:
            execute(ensemble, calls)
        else:
            now += PING_S
            if not any(step.is_open for _, step in ensemble.starts) or now - call.last_sign < LOST_S:
                calls.tick(now)
    calls.tick(now)
    assert [each.split(": ")[-1] for each, _ in ensemble.seen] == words
    assert [is_last for _, is_last in ensemble.seen] == [False] * (len(words) - 1) + [True]
    assert ensemble.num_open == 0
    assert call.is_ended
    calls.tick(now + 60)
    assert not ensemble.starts, "what has ended is pinged no more"


def test_an_error_before_the_answers_step_ends_the_request_at_once() -> None:
    ensemble = Ensemble()
    call = EnsembleCall(ensemble.first, is_told=False)
    call.send_error(Cancelled("refused"))
    call.begin([7])
    assert [is_last for _, is_last in ensemble.seen] == [True]
    assert not ensemble.starts


def test_a_cancel_is_seen_by_the_next_step_that_starts_and_told_of_each_request() -> None:
    cancelled: list[int] = []
    ensemble, calls = Ensemble(), EnsembleCalls(cancelled.append)
    calls.begin(EnsembleCall(ensemble.first, is_told=False), [7, 8])
    execute(ensemble, calls)
    calls.tick(time.monotonic() + PING_S)
    assert cancelled == []
    execute(ensemble, calls, is_cancelled=True)
    assert cancelled == [7, 8]


def test_pings_have_a_bound_and_reach_every_request_in_turn() -> None:
    calls = EnsembleCalls(lambda request_id: None)
    ensembles = [Ensemble() for _ in range(3 * MAX_PINGS)]
    for index, ensemble in enumerate(ensembles):
        calls.begin(EnsembleCall(ensemble.first, is_told=False), [index])
        execute(ensemble, calls)
    now = time.monotonic() + PING_S
    for turn in range(1, 4):
        calls.tick(now)
        assert sum(len(ensemble.starts) for ensemble in ensembles) == turn * MAX_PINGS
    assert all(len(ensemble.starts) == 1 for ensemble in ensembles)


def test_of_a_client_of_the_relay_no_step_is_open_beside_the_answers() -> None:
    ensemble, calls, call = begun(is_told=True)
    assert not ensemble.first.is_open
    execute(ensemble, calls)
    calls.tick(time.monotonic() + 60)
    assert not ensemble.starts
    call.send(text("all"), final=True)
    assert ensemble.seen == [("all", True)]


def test_a_lost_ping_holds_up_the_end_for_a_second_and_a_lost_answers_step_fails_the_request() -> None:
    ensemble, calls, call = begun()
    execute(ensemble, calls)
    now = time.monotonic() + PING_S
    calls.tick(now)
    call.send(text("all"), final=True)
    assert ensemble.seen == []
    calls.tick(now + LOST_S + 0.1)
    assert [each for each, _ in ensemble.seen] == ["all"]

    cancelled: list[int] = []
    ensemble, calls = Ensemble(), EnsembleCalls(cancelled.append)
    call = EnsembleCall(ensemble.first, is_told=False)
    calls.begin(call, [7])
    call.send(text("never"), final=False)
    calls.tick(time.monotonic() + START_S + 0.1)
    assert cancelled == [7]
    assert len(ensemble.seen) == 1 and "does not start" in ensemble.seen[0][0]
    execute(ensemble, calls)  # too late
    assert ensemble.num_open == 0


def test_a_handle_that_nobody_signed_is_refused() -> None:
    ensemble = Ensemble()
    with pytest.raises(InvalidRequest, match="stream_handle"):
        EnsembleCalls(lambda request_id: None).started("stream 7/00", ensemble.first, is_cancelled=True)
