"""The goodput of a placement by the real router and loops in virtual time."""

from dataclasses import dataclass
from typing import Any

from ensemble.config import Deployment
from tools.load.goodput import SHARE
from tools.planning.search import highest_rate
from tools.simulation.costs import Costs
from tools.simulation.simulator import Ask, Simulation


@dataclass(frozen=True, slots=True)
class Trial:
    """All that a process needs. `lengths` and `unit_times`: of each request; at a rate it comes at unit_time / rate."""

    deployment: dict[str, Any]
    costs: Costs
    prefill_costs: Costs | None
    lengths: list[tuple[int, int]]  # prompt, output
    unit_times: list[float]
    targets_ms: dict[str, float]
    upper: float  # requests a second that it cannot exceed
    number: int  # of requests, at least
    lasting_s: float  # of arrivals, at least, as far as half of the requests go
    cached_share: float = 0.0

    def asks(self, rate: float, number: int, first: int = 0) -> list[Ask]:
        """So many from `first` on. Prompts whose beginnings are in a cache belong to one of a few groups."""
        begin = self.unit_times[first - 1] if first else 0.0
        arrived = zip(self.unit_times[first:], self.lengths[first:], strict=True)
        return [
            Ask((at - begin) / rate, prompt, output, int(self.cached_share * prompt), index % 4)
            for index, (at, (prompt, output)) in zip(range(number), arrived, strict=False)
        ]


def goodput_of(trial: Trial) -> float:
    """Requests a second of which the share meets all targets."""
    deployment = Deployment.parse(trial.deployment)

    def meets(rate: float) -> bool:
        """Most rates that are too high are so for a few requests, too. Near the highest it is chance how they come: so
        the first and the last of them are tried."""
        number = max(trial.number, min(len(trial.lengths) // 2, int(trial.lasting_s * rate)))
        share = attained(trial.asks(rate, trial.number))
        if share < SHARE:
            return False
        if number > trial.number:
            share = attained(trial.asks(rate, number))
        return share + attained(trial.asks(rate, number, len(trial.lengths) - number)) >= 2 * SHARE

    def attained(asks: list[Ask]) -> float:
        records = Simulation(deployment, trial.costs, trial.prefill_costs).run(asks)
        return sum(record.meets(trial.targets_ms) for record in records) / len(records)

    return highest_rate(meets, trial.upper, precision=0.04)
