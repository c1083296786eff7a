"""The judge of a storm of kills sees what it is there to see."""

from typing import Any

import pytest

from tools.proofs.fault_storm import HUNG, Kill, Outcome, storm_rows

KILL = Kill("decode", killed_at=10.0, gone_s=0.1, served_at=16.0)
EXPECTED = [[1, 2], [3, 4]]


def missed(outcome: Outcome) -> list[str]:
    """Goals that a storm of this request and its kill misses, beside the one that has no part in it."""
    rows: list[dict[str, Any]] = storm_rows([KILL], [outcome], EXPECTED, load_s=5.0)
    return [row["name"] for row in rows if row.get("met") is False and "outlived" not in row["name"]]


def outcome(sent_at: float, ended_at: float, output_ids: list[int], error: str | None = None) -> Outcome:
    return Outcome(0, sent_at, ended_at, output_ids, error, copy_s=0.0)


@pytest.mark.parametrize(
    "good",
    [
        outcome(9.0, 11.5, [1, 2]),
        outcome(9.5, 10.9, [1], "decode is unavailable: it died"),
        outcome(14.0, 14.1, [], "decode is unavailable: it died"),
    ],
    ids=["not touched", "ended soon", "refused later"],
)
def test_what_a_kill_may_do(good: Outcome) -> None:
    assert missed(good) == []


@pytest.mark.parametrize(
    ("bad", "goal"),
    [
        (outcome(9.0, 9.5, [3, 4]), "outputs that differ"),
        (outcome(9.0, 9.5, [1]), "outputs that differ"),
        (outcome(9.5, 11.2, [1], "decode is unavailable: it died"), "kill to the last error"),
        (outcome(9.5, 10.2, [1], "prefill is unavailable: it died"), "errors that are late, or not UNAVAILABLE"),
        (outcome(9.5, 10.2, [1], "illegal memory access"), "errors that are late, or not UNAVAILABLE"),
        (outcome(8.0, 9.0, [1], "decode is unavailable: it died"), "errors that are late, or not UNAVAILABLE"),
        (outcome(9.0, 69.0, [1], HUNG), "requests hung"),
    ],
    ids=["another prompt's", "cut short", "late", "another stage", "another error", "before any kill", "hung"],
)
def test_what_a_kill_may_not_do(bad: Outcome, goal: str) -> None:
    assert any(name.startswith(goal) for name in missed(bad))


def test_service_that_does_not_come_back_is_seen() -> None:
    gone = Kill("prefill", killed_at=10.0, gone_s=0.1)
    rows = storm_rows([gone], [outcome(9.0, 9.5, [1, 2])], EXPECTED, load_s=5.0)
    assert [row["met"] for row in rows if row["name"] == "kill to service"] == [False]
