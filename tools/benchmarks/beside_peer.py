"""What clients got of this system, and of another one under the same arrivals: shares within targets.

    python -m tools.benchmarks.beside_peer goodput/auto-20 goodput/colocated peer.jsonl --goodput ttft:1000,itl:20 \
        --goodput ttft:1000,itl:16 --device "2 x NVIDIA H200" --output docs/results/beside-peer-summary.json

Folders are of tools.bench_goodput. A file of the other system has a JSON object a line for each request: mode, rate,
seed, ok, and ttft, tpot and itl in seconds, the last as tools/load/records.py has it: the longest gap of an output
below 100 tokens, else the P99 of its gaps.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from typer import Argument, Option

from ensemble.errors import ConfigError
from tools.benchmarks.results import report
from tools.command_line import run
from tools.load.records import describe, parse_targets
from tools.simulation.against_runs import read_runs


class Seen(msgspec.Struct):
    """A request as its client saw it; seconds."""

    ok: bool
    ttft: float | None
    tpot: float | None
    itl: float | None
    mode: str = ""
    rate: float = 0.0
    seed: int = 0

    def meets(self, targets_ms: dict[str, float]) -> bool:
        return self.ok and all(1e3 * (getattr(self, metric) or 0.0) <= ms for metric, ms in targets_ms.items())


def main(
    sources: Annotated[list[Path], Argument(help="folders of tools.bench_goodput, and files of another system")],
    goodput: Annotated[list[str], Option(help="METRIC:MS,...: of ttft, tpot and itl, one set of targets each time")],
    device: Annotated[str | None, Option(help="on which the records were made, if not on this one")] = None,
    output: Annotated[Path | None, Option(help="JSON file for the figures")] = None,
) -> None:
    targets = [parse_targets([each]) for each in goodput]
    for each in targets:
        if unknown := [metric for metric in each if metric not in ("ttft", "tpot", "itl")]:
            raise ConfigError(f"--goodput {unknown[0]}: must be of ttft, tpot, itl")
    runs: dict[tuple[float, str], list[Seen]] = defaultdict(list)
    for source in sources:
        for seen in of_folder(source) if source.is_dir() else of_file(source):
            runs[seen.rate, seen.mode].append(seen)
    report([row for key in sorted(runs) for row in rows_of(*key, runs[key], targets)], output, device)


def of_folder(folder: Path) -> Iterator[Seen]:
    """Raises ConfigError."""
    for mode, deployment, runs in read_runs(folder):
        scheduler = deployment.scheduler
        told = [
            f"{name} {value:g} ms"
            for name, value in (("TPOT", scheduler.tpot_target_ms), ("ITL", scheduler.itl_target_ms))
            if value is not None
        ]
        name = f"{mode} told {' and '.join(told)}" if told else mode
        for each in runs:
            rate, seed = float(each.load["request_rate"] or 0), int(each.load["seed"] or 0)
            for record in each.records:
                ok = record.is_complete
                yield Seen(
                    ok, record.ttft if ok else None, record.tpot, record.itl, f"ours, {name}", rate=rate, seed=seed
                )


def of_file(path: Path) -> Iterator[Seen]:
    """Raises ConfigError, which names the line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield msgspec.json.decode(line, type=Seen)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from None


def rows_of(rate: float, mode: str, seen: list[Seen], targets: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    seeds = len({each.seed for each in seen})
    name = f"{rate:g}/s, {mode}"
    of = f"of {len(seen)} requests" + (f", {seeds} seeds" if seeds > 1 else "")
    for each in targets:
        share = sum(one.meets(each) for one in seen) / len(seen)
        yield {"name": f"{name}: {describe(each)}", "value": round(share, 3), "unit": of}
    for metric in ("ttft", "tpot", "itl"):
        values = [1e3 * value for one in seen if one.ok and (value := getattr(one, metric)) is not None]
        if values:
            percentiles = [round(float(each), 1) for each in np.percentile(values, [50, 90, 99])]
            yield {"name": f"{name}: {metric.upper()} P50, P90, P99", "value": percentiles, "unit": "ms"}


if __name__ == "__main__":
    run(main)
