"""What the scheduling policies gain, in virtual time: the real router and loops (tools/simulation), a cost model.

    python -m tools.benchmarks.simulate_scheduling --output docs/results/scheduling.json

Steps take what DistServe's authors fitted for OPT-13B on one A100-80GB (simdistserve in their repository); swaps and
hand-offs move 0.78 MiB a token at the rates below. Seeds are fixed: the same numbers come out on every machine.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer

from ensemble.config import Deployment
from ensemble.scheduling.estimator import StepShape, TimedStep
from ensemble.scheduling.policies import Hints
from tools.benchmarks.results import report
from tools.simulation.costs import Costs
from tools.simulation.simulator import Ask, Simulation

KV_TOKEN_BYTES = int(12.5 * 2**20) // 16  # OPT-13B, fp16
SWAP_BYTES_PER_S = 25e9  # pinned host memory over PCIe 4, each direction
HANDOFF_BYTES_PER_S = 200e9  # NVLink
DECODE_POLICIES, DECODE_RATES = ("fcfs", "srpt", "mlfq", "sj-mlfq"), (9.0, 10.5)
PREFILL_POLICIES, PREFILL_RATES = ("fcfs", "sjf", "edf"), (16.0, 18.0, 20.0)
DEVICE = "none: virtual time, cost model of OPT-13B on one A100-80GB"


def costs(num_kv_tokens: int) -> Costs:
    """Prefill: 18.1 + 0.1019 a token + 7.12e-6 its length squared; decode: 19.93 + 6.27e-4 a key + 0.0385 a row; ms."""
    lens = (16, 64, 128, 256, 512, 1024, 2000)
    prompts = [(StepShape.of([(0, length)], []), 18.1 + 0.1019 * length + 7.12e-6 * length**2) for length in lens]
    rows = [
        (StepShape.of([], [length] * size), 19.93 + 6.27e-4 * length * size + 0.0385 * size)
        for length in lens
        for size in (1, 2, 4, 8, 16, 32)
    ]
    return Costs(
        steps=[TimedStep(shape, ms / 1e3) for shape, ms in prompts + rows],
        kv_token_bytes=KV_TOKEN_BYTES,
        num_kv_tokens=num_kv_tokens,
        pull_bytes_per_s=HANDOFF_BYTES_PER_S,
        swap_bytes_per_s=SWAP_BYTES_PER_S,
    )


def bounded(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def heavy_tailed(seed: int, number: int, rate: float) -> list[Ask]:
    """Poisson arrivals; prompts log-normal, outputs Pareto with shape 1.1: most are short, a few are very long."""
    rng, now, asks = random.Random(seed), 0.0, []
    for _ in range(number):
        now += rng.expovariate(rate)
        prompt_len = bounded(rng.lognormvariate(5.0, 1.0), 4, 1024)
        asks.append(Ask(now, prompt_len, bounded(16 * rng.paretovariate(1.1), 2, 1024)))
    return asks


def mixed_targets(seed: int, number: int, rate: float) -> list[Ask]:
    """Poisson arrivals; seven of ten want their first token in 0.5 s, the others in 10 s."""
    rng, now, asks = random.Random(seed), 0.0, []
    for _ in range(number):
        now += rng.expovariate(rate)
        hints = Hints(ttft_target_s=0.5 if rng.random() < 0.7 else 10.0)
        asks.append(Ask(now, bounded(rng.lognormvariate(5.5, 1.0), 4, 2000), 1, hints=hints))
    return asks


def simulation_of(
    num_kv_tokens: int, prefill: dict[str, Any], decode: dict[str, Any], queue_policy: str = "fcfs"
) -> Simulation:
    deployment = {
        "model": {"path": "opt-13b"},
        "prefill": {"devices": ["cuda:0"], **prefill},
        "decode": {"devices": ["cuda:1"], **decode},
        "scheduler": {"policy": queue_policy, "max_wait_s": 30.0},
    }
    return Simulation(Deployment.parse(deployment), costs(num_kv_tokens))


def decode_rows(number: int, seeds: range) -> Iterator[dict[str, Any]]:
    for rate in DECODE_RATES:
        fcfs: dict[str, float] = {}
        for policy in DECODE_POLICIES:
            found = [decode_figures(policy, heavy_tailed(seed, number, rate)) for seed in seeds]
            for metric in found[0]:
                value = mean(figures[metric] for figures in found)
                row = {"name": f"decode {policy}, {rate:g} requests/s: {metric}", "value": round(value, 4)}
                row["unit"] = "sequences" if metric == "swapped out" else "s"
                if policy == "sj-mlfq" and metric != "swapped out":
                    row |= {"goal": f"< {fcfs[metric]:.4f} (fcfs)", "met": value < fcfs[metric]}
                fcfs.setdefault(metric, value)
                yield row


def decode_figures(policy: str, asks: list[Ask]) -> dict[str, float]:
    decode = {
        "policy": policy,
        "quantum_s": 0.02,
        "starvation_s": 30.0,
        "host_kv_bytes": 4000 * 16 * KV_TOKEN_BYTES,
        "max_num_seqs": 16,
        "max_num_resident_seqs": 512,
    }
    simulation = simulation_of(700 * 16, {}, decode)
    records = simulation.run(asks)
    per_token_s = [record.e2el / record.output_len for record in records]
    return {
        "mean completion time": mean(record.e2el for record in records),
        "P99 completion time per output token": float(np.percentile(per_token_s, 99)),
        "swapped out": simulation.num_swapped_out,
    }


def prefill_rows(number: int, seeds: range) -> Iterator[dict[str, Any]]:
    for rate in PREFILL_RATES:
        fcfs = 0.0
        for policy in PREFILL_POLICIES:
            share = mean(attained(policy, mixed_targets(seed, number, rate)) for seed in seeds)
            row = {"name": f"prefill {policy}, {rate:g} requests/s: TTFT attainment", "value": round(share, 4)}
            row["unit"] = "share"
            if policy == "edf":
                row |= {"goal": f"> {fcfs:.4f} (fcfs)", "met": share > fcfs}
            fcfs = fcfs or share
            yield row


def attained(policy: str, asks: list[Ask]) -> float:
    """The share whose first token came in time."""
    simulation = simulation_of(80_000, {"max_num_batched_tokens": 512, "max_num_seqs": 64}, {}, policy)
    records = simulation.run(asks)
    return mean(record.ttft <= (ask.hints.ttft_target_s or 0.0) for ask, record in zip(asks, records, strict=True))


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    num_jobs: int = 2000,
    num_seeds: int = 3,
) -> None:
    report([*decode_rows(num_jobs, range(num_seeds)), *prefill_rows(num_jobs, range(num_seeds))], output, device=DEVICE)


if __name__ == "__main__":
    typer.run(main)
