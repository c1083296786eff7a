"""Roles follow the load, within their bounds, and do not flap."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.scheduling.roles import HOLD_S, SETTLE_S, Pressure, RolePolicy


class Sides:
    """A fleet under a policy: a side's pressure is its load over its replicas."""

    def __init__(self, num_prefill: int, num_decode: int, bounds: tuple[int, int | None]) -> None:
        self.num_prefill, self.num_decode = num_prefill, num_decode
        self.policy = RolePolicy(*bounds)
        self.changes: list[tuple[float, str]] = []
        self.now = 0.0

    def run(self, seconds: float, prefill_load: float, decode_load: float) -> None:
        end = self.now + seconds
        while self.now < end:
            pressure = Pressure(prefill_load / self.num_prefill, decode_load / self.num_decode)
            side = self.policy.decide(self.now, pressure, self.num_prefill, self.num_decode)
            if side is not None:
                gained = 1 if side == "prefill" else -1
                self.num_prefill, self.num_decode = self.num_prefill + gained, self.num_decode - gained
                self.changes.append((self.now, side))
            assert self.num_prefill >= 1 and self.num_decode >= 1
            self.now += 0.5


LOADS = st.floats(0, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.tuples(LOADS, LOADS), min_size=1, max_size=4))
def test_under_a_steady_load_changes_come_to_an_end_and_none_is_taken_back(num_prefill, num_decode, loads) -> None:
    sides = Sides(num_prefill, num_decode, (1, None))
    for prefill_load, decode_load in loads:
        first = len(sides.changes)
        sides.run(200.0, prefill_load, decode_load)
        assert len({side for _, side in sides.changes[first:]}) <= 1
        settled = len(sides.changes)
        sides.run(100.0, prefill_load, decode_load)
        assert len(sides.changes) == settled
    times = [at for at, _ in sides.changes]
    assert all(later - earlier >= SETTLE_S for earlier, later in pairwise(times))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.lists(st.tuples(LOADS, LOADS)))
def test_the_bounds_hold(num_prefill, num_decode, least, room, loads) -> None:
    sides = Sides(num_prefill, num_decode, (least, least + room))
    sides.run(10.0, 0.0, 0.0)
    total = num_prefill + num_decode
    for prefill_load, decode_load in loads:
        for _ in range(8):
            sides.run(5.0, prefill_load, decode_load)
            assert min(least, total - 1) <= sides.num_prefill <= max(1, least + room)


def test_a_replica_goes_where_requests_wait_and_only_after_a_while() -> None:
    sides = Sides(1, 3, (1, None))
    sides.run(100.0, 0.9, 2.5)
    assert not sides.changes  # nobody waits for long
    sides.run(HOLD_S, 1.5, 1.2)
    assert not sides.changes
    sides.run(5.0, 1.5, 1.2)
    assert [side for _, side in sides.changes] == ["prefill"]
    sides.run(SETTLE_S, 0.2, 2.5)
    assert [side for _, side in sides.changes] == ["prefill", "decode"]


def test_a_load_that_comes_and_goes_faster_than_a_wish_lasts_changes_nothing() -> None:
    sides = Sides(1, 3, (1, None))
    for _ in range(50):
        sides.run(HOLD_S - 1, 3.0, 0.1)
        sides.run(1.0, 0.1, 0.1)
    assert not sides.changes


def test_where_both_sides_are_loaded_nobody_moves() -> None:
    sides = Sides(2, 2, (1, None))
    sides.run(200.0, 4.0, 4.0)
    assert not sides.changes
