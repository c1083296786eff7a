"""Which of two replicas should give a sequence to the other one."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble.scheduling.balance import LEAST_GAIN_S, Side, gain_s, is_slower, keeps_targets
from ensemble.scheduling.estimator import StepEstimator, StepShape
from ensemble.scheduling.placement import Site

CONTEXT_LEN = 500


def estimator() -> StepEstimator:
    """10 ms, and 0.25 ms a sequence of 500 tokens."""
    steps = StepEstimator()
    for size in (1, 2, 4, 8, 16, 32, 64):
        for length in (50, 500, 2000):
            steps.observe(StepShape.of([], [length] * size), 1e-2 + 5e-7 * length * size)
    return steps


STEPS = estimator()


def side(num_seqs: int, num_waiting: int = 0, target_s: float | None = None) -> Side:
    num_running = num_seqs - num_waiting
    rows = StepShape(0, 0, num_running, CONTEXT_LEN * num_running)
    return Side(Site(0, STEPS, 2048, 2048, rows=rows, target_s=target_s), num_seqs, num_waiting)


def should_move(source: Side, reader: Side, num_tokens: int) -> bool:
    is_worth_it = gain_s(source, reader, CONTEXT_LEN, num_tokens) >= LEAST_GAIN_S
    return is_slower(source, reader, CONTEXT_LEN) and is_worth_it


@given(first=st.integers(0, 200), second=st.integers(0, 200), num_tokens=st.integers(1, 100_000))
def test_what_has_moved_has_no_reason_to_return_and_moves_come_to_an_end(
    first: int, second: int, num_tokens: int
) -> None:
    num_moves = 0
    while should_move(side(first), side(second), num_tokens):
        first, second, num_moves = first - 1, second + 1, num_moves + 1
        assert first >= second
        assert not should_move(side(second), side(first), num_tokens)
    assert num_moves <= 100


def test_a_sequence_that_ends_soon_or_finds_it_little_better_stays() -> None:
    assert should_move(side(40), side(0), 200)
    assert not should_move(side(40), side(0), 20)
    assert not should_move(side(40), side(34), 100_000)
    assert not should_move(side(1), side(0), 100_000)


def test_the_gain_is_what_the_tokens_of_all_take_less() -> None:
    def total_s(first: int, second: int) -> float:
        return sum(number * (1e-2 + 2.5e-4 * number) for number in (first, second))

    expected_s = 100 * (total_s(40, 10) - total_s(39, 11))
    assert abs(gain_s(side(40), side(10), CONTEXT_LEN, 100) - expected_s) < 0.05 * expected_s


def test_sequences_that_wait_for_their_turn_make_their_replica_slow() -> None:
    assert not should_move(side(12), side(8), 200)
    assert should_move(side(12, num_waiting=8), side(8), 200)
    assert not should_move(side(12, num_waiting=8), side(12, num_waiting=8), 100_000)


def test_targets_that_are_kept_are_not_missed_for_a_move() -> None:
    """At 16 ms a token from 24 sequences, and 20 ms from 40."""
    busy, idle = side(40), side(4)
    assert keeps_targets(busy, idle, CONTEXT_LEN, None, None)
    assert keeps_targets(busy, idle, CONTEXT_LEN, 0.1, 0.05)
    assert not keeps_targets(busy, idle, CONTEXT_LEN, 0.1, 0.2)  # it would stand still for too long
    assert not keeps_targets(busy, idle, CONTEXT_LEN, 0.1, None)  # for how long is not known
    assert keeps_targets(busy, idle, CONTEXT_LEN, 0.018, None)  # it is missed here, and kept there
    assert not keeps_targets(busy, side(36), CONTEXT_LEN, 0.018, None)
    assert not keeps_targets(busy, side(24, target_s=0.015), CONTEXT_LEN, None, None)  # those there are not helped
