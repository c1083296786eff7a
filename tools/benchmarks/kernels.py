"""Times every Triton kernel against the machine's ceilings and the best library kernel.

    python -m tools.benchmarks.kernels --output docs/results/kernels.json

The ceilings come first, in the same process: a device copy of 2 GiB (bytes read plus bytes written) and 8192-cubed
matrix products. Then each case: its launches are captured in a CUDA graph that rotates over inputs (nothing is found in
the L2 cache), and replayed in two rounds, ours and the library's by turns; a time is the median over both.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tools.benchmarks.kernel_cases import GROUPS, Case, Run

TARGET_US = 2000.0  # length of a replay
REPLAYS = 5


def capture(run: Run, num_inputs: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of enough calls of `run` to take about TARGET_US, and their number."""
    for i in range(num_inputs):
        run(i)
    torch.cuda.synchronize()
    once_us = time_us(lambda: [run(i) for i in range(num_inputs)]) / num_inputs
    rounds = max(1, min(int(TARGET_US / once_us / num_inputs), 1000 // num_inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(rounds * num_inputs):
            run(i % num_inputs)
    return graph, rounds * num_inputs


def time_us(call: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000


def measure(runs: dict[str, Run], num_inputs: int) -> dict[str, float]:
    """Median time in microseconds of one call of each, measured by turns."""
    graphs = {name: capture(run, num_inputs) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):
        for name, (graph, num_calls) in graphs.items():
            graph.replay()
            times[name] += [time_us(graph.replay) / num_calls for _ in range(REPLAYS)]
    return {name: median(values) for name, values in times.items()}


def copy_rate() -> float:
    """Bytes read and written per second by a device copy of 2 GiB; not in a graph, where copies run slower."""
    source = torch.randn(2**30, dtype=torch.float16, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / median(time_us(lambda: target.copy_(source)) for _ in range(2 * REPLAYS)) * 1e6


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of 8192-cubed products of random matrices."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    out: Tensor = torch.empty_like(a)
    return 2 * 8192**3 / measure({"matmul": lambda _: torch.mm(a, b, out=out)}, 1)["matmul"] * 1e6


def measured_row(case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
    """One case's result: the share of its ceiling, or its time where the goal is a time."""
    times = measure({"ours": case.run, **case.libraries}, case.num_inputs)
    ours = times.pop("ours")
    share = case.work / ours * 1e6 / ceilings[case.unit]
    row: dict[str, Any] = {
        "name": case.name,
        "value": ours if case.goal_us else share,
        "unit": "us" if case.goal_us else "share of copy rate" if case.unit == "bytes" else "share of matmul rate",
        "goal": case.goal_us or case.goal_share,
        "met": None,
        "time_us": ours,
        "achieved": case.work / ours * 1e6,
        "achieved_unit": "B/s" if case.unit == "bytes" else "FLOP/s",
        "library_us": times,
        "speed_to_best_library": min(times.values()) / ours if times else None,
    }
    met = []
    if case.goal_us:
        met.append(ours <= case.goal_us)
    if case.goal_share:
        met.append(share >= case.goal_share)
    if case.goal_to_cudnn:
        row["goal_to_cudnn"], row["speed_to_cudnn"] = case.goal_to_cudnn, times["cuDNN"] / ours
        met.append(row["speed_to_cudnn"] >= case.goal_to_cudnn)
    if met:
        row["met"] = all(met)
    return row


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("kernel", "us", "achieved", "share", "to library", "goal", "met", title=title)
    for row in rows:
        scale, unit = (1e9, "GB/s") if row["achieved_unit"] == "B/s" else (1e12, "TFLOP/s")
        libraries = ", ".join(f"{us / row['time_us']:.2f}x {name}" for name, us in row["library_us"].items())
        table.add_row(
            row["name"],
            f"{row['time_us']:.1f}",
            f"{row['achieved'] / scale:.0f} {unit}",
            "" if row["unit"] == "us" else f"{row['value']:.3f}",
            libraries,
            "" if row["goal"] is None else f"{row['goal']:g}",
            "" if row["met"] is None else "yes" if row["met"] else "NO",
        )
    Console(width=150).print(table)


def current_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(
    output: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Groups to run: {', '.join(GROUPS)}. Default: all.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit that is measured. Default: git's HEAD.")] = None,
) -> None:
    """Times every Triton kernel on the current GPU."""
    torch.manual_seed(0)
    ceilings = {"bytes": copy_rate(), "flops": matmul_rate(torch.float16)}
    ceiling_rows = [
        {"name": "device copy, 2 GiB", "value": ceilings["bytes"] / 1e9, "unit": "GB/s"},
        {"name": "fp16 matmul, 8192 cubed", "value": ceilings["flops"] / 1e12, "unit": "TFLOP/s"},
        {"name": "bf16 matmul, 8192 cubed", "value": matmul_rate(torch.bfloat16) / 1e12, "unit": "TFLOP/s"},
    ]
    rows = []
    for group in only or GROUPS:
        for cases in GROUPS[group]:
            rows += [measured_row(case, ceilings) for case in cases()]
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    show(rows, ", ".join([device, *(f"{row['name']}: {row['value']:.0f} {row['unit']}" for row in ceiling_rows)]))
    if output:
        result = {
            "device": device,
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "commit": commit or current_commit(),
            "command": " ".join(["python", "-m", "tools.benchmarks.kernels", *sys.argv[1:]]),
            "rows": [{"goal": None, "met": None, **row} for row in ceiling_rows] + rows,
        }
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
