"""The bound on responses that are on their way through the ensemble."""

import threading
import time
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from ensemble.serving.window import LIMIT, PATIENCE_S, Window


def started(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_full_window_lets_nobody_in_until_something_has_passed() -> None:
    window = Window()
    assert [window.enter() for _ in range(LIMIT)] == list(range(1, LIMIT + 1))
    thread = started(window.enter)
    thread.join(PATIENCE_S / 4)
    assert thread.is_alive() and window.num_inside == LIMIT
    window.passed(1)
    thread.join(PATIENCE_S / 4)
    assert not thread.is_alive() and window.num_inside == LIMIT


def test_a_heartbeat_does_not_wait() -> None:
    window = Window()
    for _ in range(LIMIT):
        window.enter()
    began = time.monotonic()
    assert window.enter(waits=False) == LIMIT + 1
    assert time.monotonic() - began < PATIENCE_S / 2


def test_lost_numbers_hold_nobody_up_for_long() -> None:
    """The server drops what a cancelled client would get: its numbers never come back."""
    window = Window()
    for _ in range(LIMIT):
        window.enter()
    began = time.monotonic()
    assert window.enter() == LIMIT + 1
    assert PATIENCE_S <= time.monotonic() - began < 10 * PATIENCE_S
    began = time.monotonic()
    for _ in range(LIMIT - 1):
        window.enter()
    assert time.monotonic() - began < PATIENCE_S, "each waited anew"


@given(st.lists(st.one_of(st.just(None), st.integers(0, 3 * LIMIT)), max_size=200))
def test_whatever_comes_back_the_number_inside_stays_true(events: list[int | None]) -> None:
    """Numbers that come twice, in any order, or that were never given."""
    window, entered, highest = Window(), 0, 0
    for number in events:
        if number is None:
            entered += 1
            assert window.enter(waits=False) == entered
        else:
            window.passed(number)
            highest = max(highest, min(number, entered))
        assert window.num_inside == entered - highest >= 0
