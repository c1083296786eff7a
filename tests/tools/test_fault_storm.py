"""The judges of storms see what they are there to see."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tools.proofs.fault_storm import storm_rows
from tools.proofs.faults import Fault, Shape, silence_rows
from tools.proofs.grpc_request import Answer
from tools.proofs.known_requests import COMPLETE, FAILED, HUNG, REFUSED, TAKEN, WENT_AWAY, WRONG, Known, Outcome, judge

KNOWN = Known({"stream": np.ones(1, bool)}, [1, 2], "ab")


def kill(served_at: float | None = 11.0, *, is_stop: bool = False) -> Fault:
    return Fault(["prefill"], [0], is_stop, 10.0, 10_000, 15.0 if is_stop else 5.0, False, 0.1, served_at)


def answer(
    output_ids: list[int],
    text: str,
    error: str | None = None,
    has_ended: bool = True,
    received_at: tuple[float, ...] = (1.0,),
) -> Answer:
    """All in one response, as over gRPC."""
    response = {"output_ids": np.array(output_ids), "text_output": np.array([text.encode()], np.object_)}
    return Answer([response] if received_at else [], error, has_ended, 0.5, [*received_at], 1.5)


def missed(faults: list[Fault], outcome: Outcome) -> list[str]:
    rows: list[dict[str, Any]] = storm_rows(faults, len(faults), [outcome], num_recoveries=1, load_s=5.0)
    return [row["name"] for row in rows if row.get("met") is False]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (answer([1, 2], "ab"), COMPLETE),
        (answer([1], "a"), WRONG),
        (answer([1, 3], "ab"), WRONG),
        (answer([1, 2], "aB"), WRONG),
        (answer([1, 2, 2], "ab"), WRONG),
        (answer([], "", received_at=()), WRONG),
        (answer([1], "a", error="decode is unavailable"), FAILED),
        (answer([1], "a", has_ended=False), HUNG),
    ],
    ids=["right", "cut short", "a token", "a letter", "a token twice", "nothing", "an error", "no end"],
)
def test_only_what_a_request_gives_alone_is_right(given: Answer, verdict: str) -> None:
    outcome = judge(KNOWN, given)
    assert outcome.verdict == verdict
    assert outcome.is_fault is (verdict != COMPLETE)
    assert bool(missed([kill()], outcome)) is (verdict != COMPLETE)


def test_the_ensemble_is_judged_by_its_text() -> None:
    pieces = [{"text_output": np.array([[piece]], np.object_)} for piece in (b"a", b"b")]
    assert judge(KNOWN, Answer(pieces, None, True)).verdict == COMPLETE
    assert judge(KNOWN, Answer(pieces[:1], None, True)).verdict == WRONG


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (answer([1], "a", has_ended=False), WENT_AWAY),
        (answer([], "", has_ended=False, received_at=()), WENT_AWAY),
        (answer([1, 2], "ab"), COMPLETE),
        (answer([2], "b", has_ended=False), WRONG),
        (answer([], "", error="decode is unavailable"), FAILED),
    ],
    ids=["a beginning", "nothing yet", "all", "no beginning", "an error"],
)
def test_what_a_client_that_goes_away_may_have_seen(given: Answer, verdict: str) -> None:
    assert judge(KNOWN, given, goes_away=True).verdict == verdict


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (answer([], "", error="max_tokens = -1: at least 1 is needed"), REFUSED),
        (answer([], "", error="a fault of the server's"), FAILED),
        (answer([1, 2], "ab"), TAKEN),
        (answer([], "", has_ended=False), HUNG),
    ],
)
def test_bad_input_is_refused(given: Answer, verdict: str) -> None:
    assert judge(KNOWN, given, is_bad=True).verdict == verdict


@pytest.mark.parametrize(
    ("silence", "fault", "is_met"),
    [
        ((9.0, 13.9), kill(), True),
        ((9.0, 14.1), kill(), False),
        ((9.0, 14.1), kill(is_stop=True), True),
        ((14.0, 30.0), kill(is_stop=True), False),
        ((1.0, 6.1), kill(), False),
    ],
    ids=["soon", "late after a kill", "in time after a SIGSTOP", "late after a SIGSTOP", "before any fault"],
)
def test_silence_of_a_stream_is_seen(silence: tuple[float, float], fault: Fault, is_met: bool) -> None:
    rows = silence_rows([fault], [Outcome(COMPLETE, 0.0, 40.0, [silence])])
    assert all(row["met"] for row in rows) is is_met


def test_a_fault_does_not_excuse_what_the_next_one_did() -> None:
    lenient = Fault(["mixed"], [0], False, 10.0, 10_000, 20.0, True, 0.1, 12.0)
    rows = silence_rows([lenient, replace(kill(), struck_at=25.0)], [Outcome(COMPLETE, 0.0, 40.0, [(24.9, 33.0)])])
    assert [row["value"] for row in rows if not row["met"]] == [8.1]


def test_silence_is_a_streams_own() -> None:
    long = Answer(KNOWN_RESPONSES, None, True, 0.0, [6.0, 6.1], 6.2)
    assert judge(KNOWN, long).silences == [(0.0, 6.0)]
    assert not judge(Known({"stream": np.zeros(1, bool)}, [1, 2], "ab"), long).silences


KNOWN_RESPONSES = [{"output_ids": np.array([i]), "text_output": np.array([t])} for i, t in ((1, "a"), (2, "b"))]


def test_a_storm_that_was_cut_short_or_did_not_recover_is_seen() -> None:
    good = Outcome(COMPLETE, 9.0, 11.0)
    assert missed([kill()], good) == []
    assert missed([kill(served_at=None)], good) == ["fault to service"]
    rows = storm_rows([kill()], 2, [good], num_recoveries=0, load_s=5.0)
    assert [row["name"] for row in rows if row.get("met") is False] == ["faults", "recoveries"]


def test_shapes_of_fleets() -> None:
    assert Shape.parse("2P1D1M") == Shape(2, 1, 1) and str(Shape(1, 0, 2)) == "1P2M"
    assert Shape.parse("1P1D1M").fields(["a", "b"]) == {
        "mode": "disaggregated",
        "prefill": {"devices": ["a"]},
        "decode": {"devices": ["b", "a"]},
    }
    assert Shape.parse("1D1M").fields(["cpu"])["mode"] == "colocated"
    for name in ("", "P", "1P", "2D", "1D1P"):
        with pytest.raises(ValueError, match="fleet ="):
            Shape.parse(name)
