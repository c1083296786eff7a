"""Which role another replica should have: prefill or decode, as the load wants it and bounds allow.

A side's pressure is what it bears over what it can: above 1 requests wait there for too long. A replica changes sides
where one is above 1, and the other one stays well below 1 without it: so what follows of a change never asks for the
change back. The wish has to last for a while, and each change is given time to work.
"""

from dataclasses import dataclass
from typing import Literal

Side = Literal["prefill", "decode"]

OVERLOADED = 1.0
LIGHT = 0.75
HOLD_S = 3.0  # a wish has lasted
SETTLE_S = 15.0  # after a change


@dataclass(frozen=True, slots=True)
class Pressure:
    prefill: float
    decode: float


class RolePolicy:
    """`now` is in seconds and does not go back."""

    def __init__(self, min_prefill: int, max_prefill: int | None) -> None:
        """Bounds of the number of replicas that prefill; at least one always decodes."""
        self._min_prefill = min_prefill
        self._max_prefill = max_prefill
        self._wish: Side | None = None
        self._wished_since = 0.0
        self._changed_at = float("-inf")

    def decide(self, now: float, pressure: Pressure, num_prefill: int, num_decode: int) -> Side | None:
        """The side that gets a replica of the other one now, if any. It is taken to be done."""
        forced = self._forced(num_prefill, num_decode)
        wish = forced or self._wanted(pressure, num_prefill, num_decode)
        if wish != self._wish:
            self._wish, self._wished_since = wish, now
        has_lasted = now - self._wished_since >= HOLD_S and now - self._changed_at >= SETTLE_S
        if wish is None or not (forced or has_lasted):
            return None
        self._wish, self._changed_at = None, now
        return wish

    def _forced(self, num_prefill: int, num_decode: int) -> Side | None:
        """What the bounds ask for, whatever the load."""
        if num_prefill < self._min_prefill and num_decode > 1:
            return "prefill"
        if self._max_prefill is not None and num_prefill > max(self._min_prefill, self._max_prefill):
            return "decode"
        return None

    def _wanted(self, pressure: Pressure, num_prefill: int, num_decode: int) -> Side | None:
        may_grow = self._max_prefill is None or num_prefill < self._max_prefill
        if pressure.prefill > OVERLOADED and may_grow and num_decode > 1:
            return "prefill" if pressure.decode * num_decode / (num_decode - 1) < LIGHT else None
        if pressure.decode > OVERLOADED and num_prefill > max(1, self._min_prefill):
            return "decode" if pressure.prefill * num_prefill / (num_prefill - 1) < LIGHT else None
        return None
