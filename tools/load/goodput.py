"""Goodput from records: the highest rate at which a share of the requests meets its targets, for any targets.

One run at each rate is enough: its records answer for every target, so that the curve of goodput over a target costs
no further run.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import numpy as np

from tools.load.records import PHASES, Run

SHARE = 0.9  # of the requests, that has to meet all targets
CURVE_POINTS = 24


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests a second. Where all rates that were measured suffice, or none does, it is a bound."""

    rate: float
    bound: str = ""  # "at least" or "less than"

    def __str__(self) -> str:
        return f"{self.bound} {self.rate:.3g}".strip()


@dataclass(frozen=True, slots=True)
class Measured:
    """All runs of one mode, by rate."""

    mode: str
    runs: dict[float, list[Run]]  # rate |-> those of several seeds

    @property
    def rates(self) -> list[float]:
        return sorted(self.runs)

    def attainment(self, rate: float, targets_ms: dict[str, float]) -> float:
        """The share of the requests of all seeds together."""
        records = [record for run in self.runs[rate] for record in run.records]
        return sum(record.meets(targets_ms) for record in records) / len(records)

    def goodput(self, targets_ms: dict[str, float], share: float = SHARE) -> Goodput:
        return goodput([(rate, self.attainment(rate, targets_ms)) for rate in self.rates], share)

    def phases(self, rate: float) -> dict[str, float]:
        """Phase |-> seconds that a request spent in it on average."""
        sums: dict[str, list[float]] = defaultdict(list)
        for run in self.runs[rate]:
            for record in run.completed:
                for name in PHASES:
                    sums[name].append(record.phases.get(name, 0.0))
        return {name: mean(values) for name, values in sums.items()}


def goodput(points: Sequence[tuple[float, float]], share: float = SHARE) -> Goodput:
    """Of (rate, attainment), by rate: where the line between two measured rates first falls below `share`."""
    if points[0][1] < share:
        return Goodput(points[0][0], "less than")
    for (rate, attained), (next_rate, next_attained) in pairwise(points):
        if next_attained < share:
            return Goodput(rate + (next_rate - rate) * (attained - share) / (attained - next_attained))
    return Goodput(points[-1][0], "at least")


def curve_targets(measured: Iterable[Measured], metric: str) -> list[float]:
    """Milliseconds that tell the modes apart: from what the best requests had to what nearly all had."""
    values = [
        1e3 * record.value(metric)
        for each in measured
        for runs in each.runs.values()
        for run in runs
        for record in run.completed
    ]
    values = [value for value in values if value > 0] or [1.0]
    low, high = np.percentile(values, [2, 99])
    return [float(f"{value:.3g}") for value in np.geomspace(low, max(high, 1.01 * low), CURVE_POINTS)]
