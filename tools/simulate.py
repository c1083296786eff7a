"""What a deployment would do under a load, in virtual time: the real router and loops, predicted steps.

    python -m tools.simulate --model DIR --gpu h100 --modes disaggregated,colocated:256 --dataset-name chat \
        --request-rates 4,8,12 --goodput ttft:250 itl:40
    python -m tools.simulate --records goodput                    # beside what tools.bench_goodput measured
    python -m tools.simulate --records goodput --model DIR --gpu h200 --no-calibrate --also itl:15,itl:30  # no GPU here

Steps take what the server's own estimator says after it was fitted: to steps of this machine (--measure, or none of the
others), to those of a file (--costs), or to rates of a GPU that is not here (--gpu). A deployment of so many replicas
is simulated as it is written, whatever this machine has.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from ensemble.config import Deployment
from ensemble.engine.engine import load_engine
from ensemble.engine.timing import time_steps
from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from ensemble.replicas.worker import cpu_threads
from tools.bench_goodput import SERVED_TARGETS, attainment_table, curve_table, numbers_of
from tools.benchmarks.results import at_most, write_results
from tools.command_line import run
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.load.goodput import Measured, curve_targets
from tools.load.records import Run, describe, parse_targets
from tools.load.workloads import DATASETS, Workload, arrivals
from tools.simulation.against_runs import Compared, compare, device_of, read_runs
from tools.simulation.costs import GPUS, Costs, SideCosts, predicted_costs, read_costs, write_costs
from tools.simulation.simulator import Ask, Simulation

GOAL_POINTS = 5.0  # of attainment
MEASURE_S = 10.0  # of steps, on this machine
CPU_PULL_BYTES_PER_S = 4e9  # within a host's memory


def main(
    more_goodput: Annotated[list[str] | None, Argument(hidden=True)] = None,
    model: Annotated[str | None, Option(envvar="MODEL", help="directory or Hub name. Default: make serve's")] = None,
    modes: Annotated[str, Option(help="MODE, MODE:TOKENS or FILE.yaml, ...")] = "disaggregated,colocated",
    replicas: Annotated[int, Option(min=2, help="of a mode that is no file; disaggregated: half of them prefill")] = 2,
    costs: Annotated[Path | None, Option(help="JSON file of a simulation or a measurement before")] = None,
    gpu: Annotated[str | None, Option(help=f"predicts its steps: {', '.join(GPUS)}")] = None,
    measure: Annotated[Path | None, Option(help="keeps the steps' times in this JSON file")] = None,
    records: Annotated[Path | None, Option(help="of tools.bench_goodput: compares with each of its runs")] = None,
    calibrate: Annotated[bool, Option(help="by the lowest rate of the records' first mode")] = True,
    also: Annotated[
        list[str] | None, Option(help="METRIC:MS,...: each in its turn, with the rest of --goodput")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="of the simulations beside each of the records")] = 3,
    request_rates: Annotated[str, Option(help="a second")] = "1,2,4",
    seconds: Annotated[float, Option(min=1, help="of arrivals, at each rate")] = 60.0,
    goodput: Annotated[list[str] | None, Option(help="METRIC:MS ...")] = None,
    dataset_name: Annotated[str, Option(help=", ".join(DATASETS))] = "random",
    dataset_path: Annotated[Path | None, Option(help="of a trace: CSV or JSONL")] = None,
    input_len: Annotated[int, Option(min=1)] = 512,
    output_len: Annotated[int | None, Option(min=1)] = None,
    range_ratio: Annotated[float, Option(min=0, max=1)] = 0.0,
    scale: Annotated[float, Option(min=0.001)] = 1.0,
    seed: int = 0,
    output: Annotated[Path | None, Option(help="JSON file for the figures")] = None,
) -> None:
    targets_ms = parse_targets([*(goodput or []), *(more_goodput or [])]) or {"ttft": 1000.0, "itl": 200.0}
    recorded = list(read_runs(records)) if records else []
    path = resolve_model(model) if model else recorded[0][1].model.path if recorded else ensure_default_model()
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: must be of {', '.join(GPUS)}")
    deployments = {
        mode: virtual_deployment(mode, path, replicas, gpu is not None, targets_ms) for mode in modes.split(",")
    }
    first = recorded[0][1] if recorded else next(iter(deployments.values()))
    costs_of: Callable[[Deployment], SideCosts]
    if costs is None and gpu is not None:
        costs_of = partial(predicted_costs, load_model_spec(path), GPUS[gpu])
    else:
        costs_of = partial(_alike, read_costs(costs) if costs is not None else measure_costs(first))
    if measure is not None:
        write_costs(measure, costs_of(first).decode)
    console = Console(width=140, highlight=False)
    if recorded:
        compared, _ = compare(recorded, costs_of, calibrate=calibrate, seeds=seeds)
        others = [targets_ms | parse_targets([each]) for text in also or [] for each in text.split(",")]
        console.print(compared_table(compared, targets_ms))
        console.print(shares_table(compared, [targets_ms, *others]))
        rows = list(compared_rows(compared, [targets_ms, *others]))
        console.print(errors_of(compared, targets_ms))
    else:
        workload = Workload(dataset_name, dataset_path, input_len, output_len, range_ratio, scale)
        rates = numbers_of("--request-rates", request_rates)
        measured = [
            Measured(mode, {rate: [simulate(each, costs_of(each), workload, rate, seconds, seed)] for rate in rates})
            for mode, each in deployments.items()
        ]
        console.print(attainment_table(measured, targets_ms))
        console.print(curve_table(measured, targets_ms, "itl", curve_targets(measured, "itl")[::4]))
        rows = [
            {
                "name": f"{each.mode}, {rate:g}/s: {describe(targets_ms)}, simulated",
                "value": round(each.attainment(rate, targets_ms), 4),
                "unit": "of the requests",
            }
            for each in measured
            for rate in each.rates
        ]
    if output is not None:
        device = f"{device_of(records)}, and virtual time beside it" if records else None
        write_results(output, rows, device)


def virtual_deployment(mode: str, path: Path, replicas: int, on_gpus: bool, targets_ms: dict[str, float]) -> Deployment:
    """Of devices that need not be here. Raises ConfigError."""
    if mode.endswith((".yaml", ".yml")):
        return Deployment.from_yaml(mode)
    name, _, chunk = mode.partition(":")
    if chunk and not chunk.isdecimal():
        raise ConfigError(f"--modes {mode}: a number of tokens is needed after the colon")
    devices = [f"cuda:{index}" if on_gpus else "cpu" for index in range(replicas)]
    num_prefill = 0 if name == "colocated" else replicas // 2
    scheduler = {f"{metric}_target_ms": ms for metric, ms in targets_ms.items() if metric in SERVED_TARGETS}
    raw: dict[str, Any] = {
        "mode": "disaggregated" if name == "auto" else name,
        "scheduler": {"roles": "auto", **scheduler} if name == "auto" else {},
        "model": {"path": str(path)},
        "prefill": {"devices": devices[:num_prefill]},
        "decode": {"devices": devices[num_prefill:], "local_prefill_tokens": int(chunk or 0)},
        "block_size": 64 if on_gpus else 16,
    }
    return Deployment.parse(raw)


def measure_costs(deployment: Deployment) -> Costs:
    """Of a replica of this deployment on its first device, alone."""
    device = torch.device(deployment.decode.devices[0])
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(deployment))
    engine = load_engine(deployment, deployment.decode, device)
    max_model_len = deployment.model.limit_model_len(engine.spec.max_model_len)
    max_num_tokens = deployment.prefill.max_num_batched_tokens
    steps = time_steps(engine, max_num_tokens, deployment.decode.max_num_seqs, max_model_len, MEASURE_S)
    layout = engine.pool.layout
    found = Costs(
        steps=steps,
        kv_token_bytes=layout.block_bytes // layout.block_size,
        num_kv_tokens=engine.pool.num_blocks * layout.block_size,
        runs_ahead=engine.runs_ahead,
    )
    return found if engine.runs_ahead else msgspec.structs.replace(found, pull_bytes_per_s=CPU_PULL_BYTES_PER_S)


def _alike(costs: Costs, deployment: Deployment) -> SideCosts:
    return SideCosts(costs, costs)


def simulate(
    deployment: Deployment, costs: SideCosts, workload: Workload, rate: float, seconds: float, seed: int
) -> Run:
    rng = random.Random(seed)
    asked = workload.draw(max(1, round(rate * seconds)), rng)
    due = arrivals(len(asked), rate, 1.0, rng)
    asks = [Ask(at, each.lengths.prompt, each.lengths.output) for at, each in zip(due, asked, strict=True)]
    records = Simulation(deployment, *costs).run(asks)
    return Run(load={"request_rate": rate}, lag_p99_ms=0.0, max_lag_ms=0.0, client_cpu_share=0.0, records=records)


# ---- beside real runs

SHOWN = (("ttft", 50), ("ttft", 90), ("tpot", 50), ("tpot", 90), ("itl", 50), ("itl", 90), ("itl", 99))


def compared_table(compared: list[Compared], targets_ms: dict[str, float]) -> Table:
    table = Table(title="Real and simulated (ms); share within the targets", title_justify="left")
    for heading in ("mode", "rate", *(f"{metric.upper()} P{percent}" for metric, percent in SHOWN), "share"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for each in compared:
        pairs = [each.percentile_ms(metric, percent) for metric, percent in SHOWN]
        cells = [f"{real:.1f} {simulated:.1f}" for real, simulated in pairs]
        real, simulated = each.attainment(targets_ms)
        table.add_row(each.mode, f"{each.rate:g}/s", *cells, f"{real:.2f} {simulated:.2f}")
    return table


def shares_table(compared: list[Compared], targets: list[dict[str, float]]) -> Table:
    """The first targets, and of the others where they differ from those."""
    title = f"Share within {describe(targets[0])}, and with others, real and simulated (%)"
    table = Table(title=title, title_justify="left")
    for heading in ("mode", "rate"):
        table.add_column(heading)
    for targets_ms in targets:
        changed = targets_ms if targets_ms == targets[0] else dict(targets_ms.items() - targets[0].items())
        table.add_column("\n".join(f"{metric} {ms:g}" for metric, ms in changed.items()), justify="right")
    for each in compared:
        pairs = [each.attainment(targets_ms) for targets_ms in targets]
        table.add_row(
            each.mode, f"{each.rate:g}/s", *(f"{100 * real:.0f} {100 * simulated:.0f}" for real, simulated in pairs)
        )
    return table


def errors_of(compared: list[Compared], targets_ms: dict[str, float]) -> str:
    """The simulation's error over all runs."""
    parts = []
    for metric, percent in SHOWN:
        pairs = [each.percentile_ms(metric, percent) for each in compared]
        errors = sorted(abs(simulated / real - 1) for real, simulated in pairs if real > 0)
        parts.append(f"{metric.upper()} P{percent} {errors[len(errors) // 2]:.0%} (at most {errors[-1]:.0%})")
    points = [100 * abs(real - simulated) for real, simulated in (each.attainment(targets_ms) for each in compared)]
    shares = f"share within {describe(targets_ms)}: {max(points):.0f} points at most"
    return f"Error, median of the runs: {', '.join(parts)}; {shares}"


def compared_rows(compared: list[Compared], targets: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    for targets_ms in targets:
        points = [100 * abs(real - simulated) for real, simulated in (each.attainment(targets_ms) for each in compared)]
        name = f"all runs: share within {describe(targets_ms)}"
        yield {"name": f"{name}, mean error", "value": round(mean(points), 1), "unit": "points"}
        yield at_most(f"{name}, largest error", round(max(points), 1), "points", GOAL_POINTS)
    for each in compared:
        label = f"{each.mode}, {each.rate:g}/s"
        for metric, percent in SHOWN:
            for side, value in zip(("real", "simulated"), each.percentile_ms(metric, percent), strict=True):
                yield {"name": f"{label}: {metric.upper()}, P{percent}, {side}", "value": round(value, 2), "unit": "ms"}
        for targets_ms in targets:
            for side, share in zip(("real", "simulated"), each.attainment(targets_ms), strict=True):
                name = f"{label}: {describe(targets_ms)}, {side}"
                yield {"name": name, "value": round(share, 4), "unit": "of the requests"}


if __name__ == "__main__":
    run(main)
