"""The bound on responses that are on their way through the ensemble."""

import time

from hypothesis import given
from hypothesis import strategies as st

from ensemble.serving.window import LIMIT, PATIENCE_S, Window


def nobody() -> None:
    raise AssertionError("there was room")


def test_whoever_finds_no_room_is_called_back_once_when_there_is_some() -> None:
    window, called = Window(), []
    for number in range(1, LIMIT + 1):
        assert window.has_room(nobody)
        assert window.enter() == number
    assert not window.has_room(lambda: called.append("first"))
    assert not window.has_room(lambda: called.append("second"))
    window.passed(1)
    assert called == ["first"]
    window.passed(1)
    assert called == ["first", "second"], "the first has not used its room, so there is some for the second"
    window.passed(LIMIT)
    assert called == ["first", "second"] and window.num_inside == 0


def test_a_heartbeat_enters_a_full_window() -> None:
    window = Window()
    assert [window.enter() for _ in range(LIMIT + 3)] == list(range(1, LIMIT + 4))
    assert window.num_inside == LIMIT + 3


def test_lost_numbers_hold_nobody_up_for_ever() -> None:
    window, called = Window(), []
    for _ in range(LIMIT):
        window.enter()
    assert not window.has_room(lambda: called.append(1))
    time.sleep(PATIENCE_S / 2)
    window.enter()  # a heartbeat
    assert called == []
    time.sleep(0.6 * PATIENCE_S)
    window.enter()
    assert called == [1] and window.has_room(nobody)


@given(st.lists(st.one_of(st.just(None), st.integers(0, 3 * LIMIT)), max_size=200))
def test_whatever_comes_back_the_number_inside_stays_true(events: list[int | None]) -> None:
    """Numbers that come twice, in any order, or that were never given."""
    window, entered, highest = Window(), 0, 0
    for number in events:
        if number is None:
            entered += 1
            assert window.enter() == entered
        else:
            window.passed(number)
            highest = max(highest, min(number, entered))
        assert window.num_inside == entered - highest >= 0
