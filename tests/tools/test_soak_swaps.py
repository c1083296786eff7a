"""The judge of a swap storm sees what it is there to see."""

import numpy as np
import pytest

from tools.proofs.grpc_request import Answer
from tools.proofs.soak_swaps import FAULTS, MIN_PREEMPTIONS, UNITS, Figures, Outcome, rows_of

EXPECTED = [1, 2, 3]


def outcome(
    output_ids: list[int], error: str | None = None, has_ended: bool = True, goes_away: bool = False
) -> Outcome:
    """Of a request whose tokens came in two responses."""
    responses = [{"output_ids": np.array(ids, np.int32)} for ids in (output_ids[:1], output_ids[1:])]
    return Outcome(Answer(responses, error, has_ended), EXPECTED, goes_away)


@pytest.mark.parametrize(
    "good",
    [
        outcome([1, 2, 3]),
        outcome([1, 2, 3], goes_away=True),
        outcome([1, 2], has_ended=False, goes_away=True),
        outcome([], has_ended=False, goes_away=True),
    ],
    ids=["whole", "ended before its client went away", "cancelled", "cancelled before its first token"],
)
def test_what_may_come_of_a_request(good: Outcome) -> None:
    assert not good.has_failed and not good.differs


@pytest.mark.parametrize(
    "bad",
    [
        outcome([1, 2, 4]),
        outcome([1, 2]),
        outcome([1, 2, 3, 4]),
        outcome([1, 2], goes_away=True),
        outcome([1, 3], has_ended=False, goes_away=True),
    ],
    ids=[
        "another token",
        "cut short",
        "too long",
        "cut short before its client went away",
        "cancelled after a wrong one",
    ],
)
def test_another_output_is_seen(bad: Outcome) -> None:
    assert bad.differs


def test_errors_and_requests_without_an_end_are_seen() -> None:
    assert outcome([1], error="decode is unavailable: it died").has_failed
    assert outcome([1], error="decode is unavailable: it died", goes_away=True).has_failed
    assert outcome([1], has_ended=False).has_failed


def missed(*changes: Figures) -> set[str]:
    """Goals missed by parts that are as they should be but for their changes."""
    sound = dict.fromkeys(UNITS, 0.0) | {"requests": 100.0, "preemptions": 100 * MIN_PREEMPTIONS}
    rows = rows_of({f"part {index}": sound | change for index, change in enumerate(changes)})
    return {row["name"] for row in rows if row.get("met") is False}


def test_each_goal_is_one_of_every_part() -> None:
    assert missed({}, {}) == set()
    for name in FAULTS:
        assert missed({}, {name: 1.0}) == {name}
        assert missed({name: 1.0}, {name: -1.0}) == {name}
    [preemptions] = missed({"preemptions": 1000.0}, {"preemptions": 100 * MIN_PREEMPTIONS - 1})
    assert preemptions.startswith("preemptions")
