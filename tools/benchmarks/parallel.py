"""What a second GPU gives one model: tensor and pipeline parallelism, the all-reduce, KV between ranks, the start.

    python -m tools.benchmarks.parallel --output docs/results/parallel.json

Dummy weights. A replica's processes run with one rank, with tp=2 and with pp=2, one after the other. On CPUs
(`--devices cpu,cpu`) the model is tiny and only shows that all of this runs. A section that fails or is late is a row
that says so; the others go on.
"""

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from ensemble.config import Deployment
from ensemble.engine.engine import use_device
from ensemble.parallel.group import meet
from ensemble.parallel.tensor_parallel import TensorParallel
from ensemble.transfer import nccl
from tools.benchmarks import transports
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.parallel_steps import ALONE, LAYOUTS, NUM_WARM_UP, Load, load_for, replica_rows
from tools.benchmarks.results import at_most, report, write_results
from tools.benchmarks.sections import Row, end_with_parent, run_section

NUM_ALL_REDUCES, NUM_REPLAYS = 80, 20  # in a graph: two for each of 40 layers
ALL_REDUCE_ROWS = (1, 32, 128)
ALL_REDUCE_GOAL_US, START_GOAL_S = 12.0, 20.0
MEET_S = 60.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of a layout with one rank."""

    layout: str
    measure: str
    goal: float  # times as fast


COMPARISONS = {
    "tp-decode": Comparison("tp=2", "decode step", 1.70),
    "tp-prefill": Comparison("tp=2", "prefill", 1.70),
    "pp-prefill": Comparison("pp=2", "prefill, prompts in a row", 1.85),
    "pp-decode": Comparison("pp=2", "decode, rows in each micro-batch", 1.7),
}


def all_reduce_rows(load: Load, devices: list[str], run_dir: Path) -> Iterator[Row]:
    """As decode steps have them: in a graph, by the group of the ranks; on CPUs one after the other.

    In each way that the ranks have. The goal is that of the way which they take.
    """
    address = f"file://{run_dir}/group"
    other = multiprocessing.get_context("spawn").Process(
        target=_other_rank, args=(load, devices[1], address), daemon=True
    )
    other.start()
    for num_rows, way, is_taken, times_us in all_reduce_times(load, devices[0], 0, address):
        name = f"all-reduce of {num_rows} x {load.config['hidden_size']}, {load.dtype}, {way}"
        value = round(median(times_us), 2)
        version = {"nccl": nccl.version()} if way == "nccl" else {}
        if is_taken and num_rows == load.num_rows and not load.is_dry:
            yield at_most(name, value, "us", ALL_REDUCE_GOAL_US) | version
        else:
            yield {"name": name, "value": value, "unit": "us"} | version


def _other_rank(load: Load, device: str, address: str) -> None:
    end_with_parent()
    for _ in all_reduce_times(load, device, 1, address):
        pass


def all_reduce_times(
    load: Load, device_name: str, rank: int, address: str
) -> Iterator[tuple[int, str, bool, list[float]]]:
    """For each number of rows and each way: whether the ranks take it, and microseconds."""
    device = torch.device(device_name)
    use_device(device)
    parallel = meet(address, rank, 2, 1, device, MEET_S).tensor
    library = "gloo" if device.type == "cpu" else "nccl"
    for num_rows in ALL_REDUCE_ROWS:
        x = torch.zeros(num_rows, load.config["hidden_size"], dtype=getattr(torch, load.dtype), device=device)
        is_one_shot = parallel.one_shot is not None and parallel.one_shot.takes(x)
        if is_one_shot:
            yield num_rows, "one shot", True, all_reduce_us(parallel, x)
        yield num_rows, library, not is_one_shot, all_reduce_us(replace(parallel, one_shot=None), x)


def all_reduce_us(parallel: TensorParallel, x: torch.Tensor) -> list[float]:
    """Microseconds of each of NUM_ALL_REDUCES, by replay."""

    def reduce_all() -> None:
        for _ in range(NUM_ALL_REDUCES):
            parallel.all_reduce(x)

    reduce_all()
    if x.device.type == "cpu":
        return [_seconds_of(reduce_all) / NUM_ALL_REDUCES * 1e6 for _ in range(NUM_REPLAYS)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog calls too
        reduce_all()
    times_us = []
    for _ in range(NUM_WARM_UP + NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # both ranks are there when it ends
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times_us.append(start.elapsed_time(end) / NUM_ALL_REDUCES * 1e3)
    return times_us[NUM_WARM_UP:]


def _seconds_of(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def transport_rows(devices: list[str], num_ranks: int) -> Iterator[Row]:
    random.seed(0)
    target = torch.device(devices[1])
    use_device(target)
    for row in transports.rows_of(devices[0], target, num_ranks):
        yield row | {"name": f"KV by {row['name']}"}


def start_rows(load: Load, devices: list[str], run_dir: Path, limit_s: float) -> Iterator[Row]:
    """Twice: caches of kernels and files are warm the second time."""
    # What a server needs and ranks do not may be missing: that is this section's failure alone.
    from tools.benchmarks.start import SHARE, start
    from tools.proofs.gpu_smoke import write_model_dir

    path = run_dir / "model"
    write_model_dir(path, load.config)
    decode = {"devices": devices, "tp": 2, "gpu_memory_utilization": SHARE["colocated"]} | load.stage
    deployment = Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": path, "dtype": load.dtype, "load_format": "dummy"},
            "decode": decode,
            "block_size": load.block_size,
        }
    )
    for caches in ("as found", "warm"):
        ready_s, first_token_s = start(deployment, run_dir / "log", timeout_s=0.4 * limit_s)
        name = f"{load.model}, tp=2, colocated, caches {caches}"
        if caches == "warm" and not load.is_dry:
            yield at_most(f"{name}: start to ready", ready_s, "s", START_GOAL_S)
        else:
            yield {"name": f"{name}: start to ready", "value": ready_s, "unit": "s"}
        yield {"name": f"{name}: first request, one token", "value": first_token_s, "unit": "s"}


SECTIONS = [*COMPARISONS, "all-reduce", "transports", "start"]


class Report:
    """Runs sections, each for `limit_s` at most and all for `total_s`, and writes their rows as they come."""

    def __init__(self, limit_s: float, total_s: float, output: Path | None) -> None:
        self.rows: list[Row] = []
        self.limit_s = limit_s
        self._output = output
        self._start = time.monotonic()
        self._deadline = self._start + total_s

    def run(self, section: str, work: Callable[..., Iterator[Row]], arguments: tuple[Any, ...]) -> str | None:
        """Why the section did not come to its end; None if it did."""
        self._say(f"{section} ...")
        limit_s = min(self.limit_s, self._deadline - time.monotonic())
        reason = run_section(work, arguments, limit_s, self.add) if limit_s > 0 else "no time is left"
        if reason is not None:
            self._say(f"{section}: {reason}")
        if self._output is not None:
            write_results(self._output, self.rows)
        return reason

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._say(f"{row['name']}: {row['value']} {row['unit']}")

    def fail(self, name: str, reason: str, goal: float | None = None) -> None:
        self.add({"name": name, "value": reason, "unit": "", "goal": goal, "met": False})

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SECTIONS)}; may be repeated")] = None,
    devices: Annotated[str, typer.Option(help="of two ranks")] = "cuda:0,cuda:1",
    model: Annotated[str, typer.Option(help=f"of {', '.join(SHAPES)}; on CPUs a tiny one")] = "LLaMA-2-13B",
    limit_s: Annotated[float, typer.Option(help="for each section, or replica")] = 120.0,
    total_s: Annotated[float, typer.Option(help="for all of them")] = 540.0,
) -> None:
    """Exit status 1 if a goal is missed or a section has failed."""
    wanted, both = only or SECTIONS, devices.split(",")
    if unknown := [each for each in wanted if each not in SECTIONS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: {', '.join(SECTIONS)} are allowed", param_hint="--only")
    if len(both) != 2 or len({device.partition(":")[0] for device in both}) != 1:
        raise typer.BadParameter(f"{devices}: two of a kind are needed, by a comma", param_hint="--devices")
    if model not in SHAPES:
        raise typer.BadParameter(f"{model}: {', '.join(SHAPES)} are allowed", param_hint="--model")
    load, progress = load_for(both[0], model), Report(limit_s, total_s, output)
    with tempfile.TemporaryDirectory() as folder:

        def run_dir(name: str) -> Path:
            path = Path(folder) / name
            path.mkdir()
            return path

        compare(progress, load, both, [COMPARISONS[each] for each in wanted if each in COMPARISONS], run_dir)
        if "all-reduce" in wanted and (
            reason := progress.run("all-reduce", all_reduce_rows, (load, both, run_dir("ar")))
        ):
            progress.fail("all-reduce", reason, load.goal(ALL_REDUCE_GOAL_US))
        for num_ranks in (1, 2) if "transports" in wanted else ():
            section = f"KV from {num_ranks} ranks to one"
            if reason := progress.run(section, transport_rows, (both, num_ranks)):
                progress.fail(section, reason)
        if "start" in wanted and (reason := progress.run("start", start_rows, (load, both, run_dir("start"), limit_s))):
            progress.fail("start to ready", reason, load.goal(START_GOAL_S))
    report(progress.rows, output)


def compare(
    progress: Report, load: Load, devices: list[str], comparisons: list[Comparison], run_dir: Callable[[str], Path]
) -> None:
    """Each layout's replica runs for all that is measured of it."""
    reasons: dict[str, str | None] = {}
    for layout in LAYOUTS:
        of_layout = [each for each in comparisons if layout in (ALONE, each.layout)]
        if not of_layout:
            continue
        measures = [each.measure for each in of_layout]
        arguments = (load, devices, layout, measures, run_dir(layout.replace(" ", "-")))
        reasons[layout] = progress.run(layout, replica_rows, arguments)
        for each in of_layout if layout != ALONE else ():
            progress.add(ratio_row(progress.rows, load, each, reasons[ALONE] or reasons[layout]))


def ratio_row(rows: list[Row], load: Load, comparison: Comparison, reason: str | None) -> Row:
    """How many times as fast the layout is; `reason`: why there may be no figures of the two."""
    name, goal = f"{comparison.layout}: {comparison.measure}, against {ALONE}", load.goal(comparison.goal)
    names = [f"{load.model}, {layout}: {comparison.measure}" for layout in (ALONE, comparison.layout)]
    measured = [row for row in rows if row["name"] in names and row["unit"]]
    if len(measured) < len(names):
        return {"name": name, "value": reason or "not measured", "unit": "", "goal": goal, "met": False}
    alone, several = (row["value"] for row in measured)
    ratio = alone / several if measured[0]["unit"] == "ms" else several / alone
    met = None if goal is None else ratio >= goal
    return {"name": name, "value": round(ratio, 3), "unit": "times as fast", "goal": goal, "met": met}


if __name__ == "__main__":
    typer.run(main)
