"""One response of a stream on its way through the ensemble."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble.serving.pacing import PATIENCE_S, Pace


def test_the_next_response_leaves_when_the_last_has_passed_or_must_be_lost() -> None:
    pace = Pace()
    assert pace.is_clear
    first = pace.leave(now=0.0)
    assert not pace.is_clear and not pace.is_overdue(PATIENCE_S)
    pace.give_up(PATIENCE_S)
    assert not pace.is_clear
    pace.give_up(PATIENCE_S + 0.01)
    assert pace.is_clear and not pace.is_overdue(100.0)
    second = pace.leave(now=1.0)
    pace.passed(first)
    assert not pace.is_clear, "that of the first was late, not lost: it says nothing of the second"
    pace.passed(second)
    assert pace.is_clear


@given(st.lists(st.one_of(st.none(), st.integers(-1, 50)), max_size=60))
def test_whatever_number_comes_back_only_the_last_that_left_makes_way(events: list[int | None]) -> None:
    """Numbers that come twice, in any order, or that were never given."""
    pace, last, is_clear = Pace(), 0, True
    for number in events:
        if number is None:
            last, is_clear = last + 1, False
            assert pace.leave(0.0) == last
        else:
            pace.passed(number)
            is_clear = is_clear or number == last
        assert pace.is_clear == is_clear
