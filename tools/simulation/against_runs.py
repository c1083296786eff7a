"""Simulated runs beside recorded ones of the same requests: how far off the simulation is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from tools.load.records import Record, Run
from tools.load.summary import values_ms
from tools.simulation.costs import SideCosts
from tools.simulation.simulator import Ask, Simulation

DEPLOYMENT_FILE = "deployment.yaml"  # of a mode, beside its runs


@dataclass(frozen=True, slots=True)
class Compared:
    """A recorded run and its simulations, one after the other."""

    mode: str
    rate: float
    real: list[Record]
    simulated: list[Record]

    def attainment(self, targets_ms: dict[str, float]) -> tuple[float, float]:
        real, simulated = (
            sum(each.meets(targets_ms) for each in records) / len(records) for records in (self.real, self.simulated)
        )
        return real, simulated

    def percentile_ms(self, metric: str, percent: float) -> tuple[float, float]:
        real, simulated = (values_ms([each for each in side if each.times], metric) for side in self.sides)
        return float(np.percentile(real, percent)), float(np.percentile(simulated, percent))

    @property
    def sides(self) -> tuple[list[Record], list[Record]]:
        return self.real, self.simulated


def read_runs(folder: Path) -> Iterator[tuple[str, Deployment, list[Run]]]:
    """Of each mode that `tools.bench_goodput` measured there, by rate. Raises ConfigError."""
    found = sorted(folder.glob(f"*/{DEPLOYMENT_FILE}"))
    if not found:
        raise ConfigError(f"--records {folder}: no folder in it has a {DEPLOYMENT_FILE}, as tools.bench_goodput writes")
    for path in found:
        files = sorted(path.parent.glob("*.json"))
        runs = [msgspec.json.decode(file.read_bytes(), type=Run) for file in files]
        if runs:
            yield path.parent.name, Deployment.from_yaml(path), sorted(runs, key=rate_of)


def rate_of(run: Run) -> float:
    return float(run.load["request_rate"] or "inf")


def device_of(folder: Path) -> str:
    """On which the runs there were made, as tools.bench_goodput wrote it beside them."""
    try:
        return str(msgspec.json.decode((folder / "goodput.json").read_bytes())["device"])
    except (OSError, msgspec.MsgspecError, KeyError):
        return "unknown"


def replay(run: Run, deployment: Deployment, costs: SideCosts, seeds: int = 1) -> list[Record]:
    """The run's own requests at their own times, with each seed."""
    asks = [Ask(each.due, each.prompt_len, each.output_len) for each in run.records]
    costs = costs.by(str(run.load.get("endpoint") or "ensemble"))
    return [record for seed in range(seeds) for record in Simulation(deployment, *costs, seed=seed).run(asks)]


class Calibration(NamedTuple):
    """What a server takes beyond its costs."""

    factor: float = 1.0  # of steps
    front_s: float = 0.0  # more from the client to the router


def compare(
    modes: Sequence[tuple[str, Deployment, list[Run]]],
    costs_of: Callable[[Deployment], SideCosts],
    *,
    calibrate: bool,
    seeds: int = 1,
) -> tuple[list[Compared], Calibration]:
    """Every run beside its simulation.

    calibrate: two numbers are taken from the first mode's run of the lowest rate, by its medians: how much longer steps
    take beside a whole server than alone (TPOT), and the way from client to router (TTFT). That run says little then.
    """
    _, first, runs = modes[0]
    found = calibration(runs[0], first, costs_of(first)) if calibrate else Calibration()
    compared = [
        Compared(mode, rate_of(run), run.records, replay(run, deployment, costs_of(deployment).changed(*found), seeds))
        for mode, deployment, runs in modes
        for run in runs
    ]
    return compared, found


def calibration(run: Run, deployment: Deployment, costs: SideCosts, rounds: int = 3) -> Calibration:
    factor = 1.0
    for _ in range(rounds):
        found = Compared("", 0.0, run.records, replay(run, deployment, costs.changed(factor, 0.0)))
        real_tpot, tpot = found.percentile_ms("tpot", 50)
        factor *= real_tpot / tpot
    found = Compared("", 0.0, run.records, replay(run, deployment, costs.changed(factor, 0.0)))
    real_ttft, ttft = found.percentile_ms("ttft", 50)
    return Calibration(factor, (real_ttft - ttft) / 1e3)
