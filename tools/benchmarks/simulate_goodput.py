"""Whether `auto` is ever worse than a static mode of the same two GPUs, in virtual time: the real router and loops.

    python -m tools.benchmarks.simulate_goodput --output docs/results/goodput-simulated.json

Two H100 by the rates of tools/simulation/costs.py, fp16. Of each load and target: the goodput (requests a second, with
90 % of the requests within the targets) of disaggregated (1 + 1), colocated (2) at several chunks, and auto, which is
told the targets. Without targets: requests a second where all come faster than anybody can serve them, and the mean
time of a request where they come at 0.6 of the best rate. The goal is 0.97 of the best static mode. Seeds are fixed:
the same numbers come out on every machine.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from ensemble.scheduling.estimator import StepShape
from ensemble.scheduling.policies import Hints
from tools.benchmarks.results import report
from tools.load.goodput import SHARE, goodput
from tools.load.records import Record
from tools.load.workloads import arrivals
from tools.simulation.costs import GPUS, Costs, ModelSize, kv_tokens, predicted_steps, step_s
from tools.simulation.simulator import Ask, Simulation

GOAL = 0.97  # of the best static mode
AUTO = "auto"
STATIC = ("disaggregated", *(f"colocated:{chunk}" for chunk in (128, 192, 256, 512, 2048)))
GPU = GPUS["h100"]
USED_MEMORY = 0.9  # share of it
OPT_13B = ModelSize(40, 5120, 40, 40, 128, 12_840_000_000, 2)
LLAMA_2_13B = ModelSize(40, 5120, 40, 40, 128, 12_850_000_000, 2)
LLAMA_3_8B = ModelSize(32, 4096, 32, 8, 128, 7_500_000_000, 2)
LIGHT = 0.6  # of the best rate
RATIO = 1.06  # of two rates that are tried
DEVICE = "none: virtual time, cost model of two H100"


@dataclass(frozen=True, slots=True)
class Targets:
    """Of all requests of a load, beside what each has of its own."""

    name: str
    ms: tuple[tuple[str, float], ...]  # metric and milliseconds

    def are_met(self, ask: Ask, record: Record) -> bool:
        ttft_s = ask.hints.ttft_target_s
        return record.meets(dict(self.ms)) and (ttft_s is None or record.ttft <= ttft_s)


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    model: ModelSize
    prompt: tuple[int, int]  # tokens, from and to, evenly drawn
    output: tuple[int, int]
    rates: tuple[float, float]  # between which the goodput of every mode is looked for
    targets: tuple[Targets, ...] = ()  # none: what is looked for is throughput, and the mean time
    share: float = 1.0  # of the requests that are asked for: prompts that are long take long
    ttft_prefills: float = 0.0  # each request's TTFT target: so many times its own prefill on an idle GPU

    def asks(self, rate: float, number: int, seed: int) -> list[Ask]:
        """The same requests, closer together at a higher rate."""
        rng = random.Random(seed)
        due = arrivals(number, 1.0, 1.0, rng)
        asks = []
        for at in due:
            prompt_len, output_len = rng.randint(*self.prompt), rng.randint(*self.output)
            hints = Hints()
            if self.ttft_prefills:
                alone_s = step_s(self.model, GPU, StepShape.of([(0, prompt_len)], []), 1)
                hints = Hints(ttft_target_s=self.ttft_prefills * alone_s)
            asks.append(Ask(at / rate, prompt_len, output_len, hints=hints))
        return asks


def decode_steps(model: ModelSize, times: float, num_rows: int, context_len: int) -> float:
    """Milliseconds of so many steps."""
    return round(1e3 * times * step_s(model, GPU, StepShape.of([], [context_len] * num_rows), 1), 1)


def itl(ms: float, ttft_ms: float = 1000.0) -> Targets:
    return Targets(f"TTFT {ttft_ms:g} ms, ITL {ms:g} ms", (("ttft", ttft_ms), ("itl", ms)))


CHAT_STEP_MS = decode_steps(OPT_13B, 1.2, 32, 759 + 118)
LONG_STEPS_MS = {times: decode_steps(LLAMA_3_8B, times, 4, 19_100) for times in (1.2, 1.5)}
LOADS = (
    Load(
        "summary, 1,949 in, 16 out, LLaMA-2-13B",
        LLAMA_2_13B,
        (1949, 1949),
        (16, 16),
        (2.0, 26.0),
        tuple(itl(ms) for ms in (14.0, 16.0, 20.0, 30.0)),
    ),
    Load(
        "chat, 759 in, 235 out, OPT-13B",
        OPT_13B,
        (759, 759),
        (235, 235),
        (3.0, 30.0),
        (Targets("TTFT 250 ms, TPOT 40 ms", (("ttft", 250.0), ("tpot", 40.0))), itl(CHAT_STEP_MS, 250.0)),
    ),
    Load(
        "long prompts, 8,000 to 30,000 in, 200 out, LLaMA-3-8B",
        LLAMA_3_8B,
        (8000, 30_000),
        (200, 200),
        (0.2, 4.0),
        tuple(
            Targets(f"TTFT 3 prefills, ITL {ms:g} ms ({times:g} decode steps)", (("itl", ms),))
            for times, ms in LONG_STEPS_MS.items()
        ),
        0.4,
        3.0,
    ),
    Load("short outputs: 1,949 in, 16 out, LLaMA-2-13B", LLAMA_2_13B, (1949, 1949), (16, 16), (2.0, 30.0)),
    Load("short outputs: 512 in, 2 to 32 out, LLaMA-2-13B", LLAMA_2_13B, (512, 512), (2, 32), (5.0, 120.0)),
    Load("middling: 1,000 in, 16 to 240 out, LLaMA-2-13B", LLAMA_2_13B, (500, 1500), (16, 240), (2.0, 60.0)),
    Load("chat, 759 in, 235 out, OPT-13B", OPT_13B, (759, 759), (235, 235), (2.0, 40.0)),
)


def deployment_of(mode: str, told: Targets | None) -> Deployment:
    """Of two GPUs."""
    name, _, chunk = mode.partition(":")
    is_colocated = name == "colocated"
    scheduler = {} if told is None else {f"{metric}_target_ms": ms for metric, ms in told.ms}
    raw: dict[str, Any] = {
        "mode": name if is_colocated else "disaggregated",
        "model": {"path": "virtual"},
        "prefill": {"devices": [] if is_colocated else ["cuda:0"]},
        "decode": {"devices": ["cuda:0", "cuda:1"] if is_colocated else ["cuda:1"]},
        "scheduler": {"roles": "auto" if name == AUTO else "fixed", **scheduler},
        "block_size": 64,
    }
    if chunk:
        raw["decode"]["local_prefill_tokens"] = int(chunk)
    return Deployment.parse(raw)


@dataclass(frozen=True, slots=True)
class Runs:
    """Of a mode under a load, as many at each rate as there are seeds."""

    load: Load
    mode: str
    number: int  # of requests in each
    seeds: range

    def at(self, rate: float, told: Targets | None = None) -> list[tuple[Ask, Record]]:
        max_len = max(4096, self.load.prompt[1] + self.load.output[1])
        model = self.load.model
        costs = Costs(
            steps=predicted_steps(model, GPU, 1, 2048, max_len),
            kv_token_bytes=model.kv_token_bytes,
            num_kv_tokens=kv_tokens(model, GPU, 1, USED_MEMORY),
            pull_bytes_per_s=0.8 * GPU.link_rate,
            swap_bytes_per_s=GPU.host_rate,
        )
        pairs: list[tuple[Ask, Record]] = []
        for seed in self.seeds:
            asks = self.load.asks(rate, self.number, seed)
            pairs += zip(asks, Simulation(deployment_of(self.mode, told), costs).run(asks), strict=True)
        return pairs

    def goodputs(self) -> list[float]:
        """Requests a second, for each of the targets: between two neighbours of a row of rates, by the line that joins
        them. Auto alone is told the targets; else one run at a rate serves them all."""
        at = cache(self.at)
        return [self._goodput(targets, at) for targets in self.load.targets]

    def _goodput(self, targets: Targets, at: Callable[..., list[tuple[Ask, Record]]]) -> float:
        lowest, highest = self.load.rates

        def attained(index: int) -> tuple[float, float]:
            rate = lowest * RATIO**index
            pairs = at(rate, targets if self.mode == AUTO else None)
            return rate, mean(targets.are_met(*pair) for pair in pairs)

        low, high = -1, ceil(log(highest / lowest, RATIO))  # indices: of a rate that is good, and of one that is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if attained(middle)[1] >= SHARE else (low, middle)
        return goodput([attained(low), attained(high)]).rate if low >= 0 else 0.0

    def throughput(self) -> float:
        """Requests a second until all are answered, where they come faster than that; of so many the last ones, behind
        whom nobody waits, count little."""
        runs = replace(self, number=4 * self.number)
        last = max(record.times[-1] for _, record in runs.at(self.load.rates[1]))
        return runs.number / last

    def mean_time(self, rate: float) -> float:
        """Seconds of a request from its arrival to its last token."""
        return mean(record.e2el for _, record in self.at(rate))


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    only: Annotated[str, typer.Option(help="loads whose names have this in them")] = "",
    num_requests: Annotated[int, typer.Option(min=10, help="of a run")] = 600,
    num_seeds: Annotated[int, typer.Option(min=1, help="runs of a rate")] = 2,
    processes: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    loads = [load for load in LOADS if only in load.name]
    if not loads:
        raise ConfigError(f"--only {only}: is in no name of {', '.join(load.name for load in LOADS)}")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def each_mode(load: Load, what: Callable[..., Any], *arguments: Any) -> dict[str, Future[Any]]:
            number = round(load.share * num_requests)
            runs = [Runs(load, mode, number, range(num_seeds)) for mode in (*STATIC, AUTO)]
            return {each.mode: pool.submit(what, each, *arguments) for each in runs}

        goodputs = [(load, each_mode(load, Runs.goodputs)) for load in loads if load.targets]
        throughputs = [(load, each_mode(load, Runs.throughput)) for load in loads if not load.targets]
        for load, found in goodputs:
            for index, targets in enumerate(load.targets):
                values = {mode: each.result()[index] for mode, each in found.items()}
                rows += rows_of(f"{load.name}; {targets.name}: goodput", "requests/s", values, more_is_better=True)
        times = []
        for load, found in throughputs:
            values = {mode: each.result() for mode, each in found.items()}
            rows += rows_of(f"{load.name}; no targets, overload", "requests/s", values, more_is_better=True)
            rate = LIGHT * max(values.values())
            times.append((load, rate, each_mode(load, Runs.mean_time, rate)))
        for load, rate, found in times:
            values = {mode: each.result() for mode, each in found.items()}
            rows += rows_of(f"{load.name}; no targets, {rate:.3g}/s: mean time", "s", values, more_is_better=False)
    report(rows, output, device=DEVICE)


def rows_of(name: str, unit: str, values: dict[str, float], *, more_is_better: bool) -> Iterator[dict[str, Any]]:
    for mode, value in values.items():
        yield {"name": f"{name}, {mode}", "value": round(value, 3), "unit": unit}
    statics = [value for mode, value in values.items() if mode != AUTO]
    best = max(statics) if more_is_better else min(statics)
    ratio = values[AUTO] / max(best, 1e-9) if more_is_better else best / values[AUTO]
    row = {"name": f"{name}, auto over the best static mode", "value": round(ratio, 3), "unit": "times"}
    yield row | {"goal": f">= {GOAL}", "met": ratio >= GOAL}


if __name__ == "__main__":
    typer.run(main)
