"""Figures of goodput: the curve over a target, and where the latency goes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.load.goodput import SHARE, Measured
from tools.load.records import NAMES, PHASES, describe

PHASE_COLORS = ("#bab0ac", "#4e79a7", "#f28e2b", "#e15759", "#59a14f")


def plot_curve(
    path: Path, measured: Sequence[Measured], metric: str, curve_ms: list[float], targets_ms: dict[str, float]
) -> None:
    """Goodput over the target of one metric, the other targets as they are. A bound is an open mark."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for each in measured:
        found = [each.goodput(targets_ms | {metric: ms}) for ms in curve_ms]
        rates = [0.0 if point.bound == "less than" else point.rate for point in found]
        (line,) = axes.plot(curve_ms, rates, label=each.mode)
        bounds = [(ms, rate) for ms, rate, point in zip(curve_ms, rates, found, strict=True) if point.bound]
        axes.scatter(*zip(*bounds, strict=True), facecolors="none", edgecolors=line.get_color()) if bounds else None
    others = {name: ms for name, ms in targets_ms.items() if name != metric}
    axes.set(xscale="log", xlabel=f"{NAMES[metric]} target (ms)", ylabel=f"goodput at {SHARE:.0%} (requests/s)")
    axes.set_title(describe(others) if others else "", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_phases(path: Path, measured: Sequence[Measured]) -> None:
    """Mean latency of a request by phase: a stack for each mode and rate."""
    figure = Figure(figsize=(max(5.0, 1.2 * sum(len(each.rates) for each in measured)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{each.mode}\n{rate:g}/s" for each in measured for rate in each.rates]
    stacks = [each.phases(rate) for each in measured for rate in each.rates]
    bottoms = [0.0] * len(stacks)
    for phase, color in zip(PHASES, PHASE_COLORS, strict=True):
        heights = [1e3 * stack.get(phase, 0.0) for stack in stacks]
        axes.bar(labels, heights, bottom=bottoms, label=phase, color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="mean latency of a request (ms)")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)
