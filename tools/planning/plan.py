"""Plans: which placements and colocated replicas are tried, and how they are judged."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from statistics import mean
from typing import Any

from rich.progress import Progress

from ensemble.config import StageConfig
from ensemble.errors import ConfigError
from ensemble.models.spec import ModelSpec
from tools.bench_goodput import SERVED_TARGETS
from tools.load.workloads import Workload, arrivals
from tools.planning.deployments import Deployments
from tools.planning.replica_costs import ReplicaCosts
from tools.planning.search import MOST_TIMES, Cluster, Demand, Placement, better, candidates, degrees, meets_together
from tools.planning.verify import Trial, goodput_of
from tools.simulation.costs import Costs, Gpu
from tools.simulation.simulator import Ask

MAX_REQUESTS = 1500  # of a trial by the router
NUM_TOGETHER = 12  # of the best placements: tried with both phases
MARGIN = 1.1  # of the rate that is asked for

RatesOf = Callable[[list[Trial]], list[float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to use the cluster, and what it can do."""

    name: str
    num_gpus: int
    goodput: float
    judged_by: str
    deployment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is planned for, and how hard."""

    spec: ModelSpec
    gpu: Gpu
    cluster: Cluster
    workload: Workload
    targets_ms: dict[str, float]
    rate: float | None
    measured: Costs | None = None  # of one GPU
    cached_share: float = 0.0
    swap_bytes: int = 0
    affinity: str = "both"
    endpoint: str = "ensemble"  # that clients ask: by how many their responses leave
    budget: int = 2048
    num_requests: int = 400  # of a trial of one replica
    lasting: float = 30.0  # times the TTFT target: what comes 4 % too fast has by then a queue as long as that
    lives: float = 3.0  # times what an answer may take: there are as many of them at once then as there will be
    num_verified: int = 6  # of the best placements: tried by the router
    jobs: int = 1  # trials at a time
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)  # of colocated replicas

    @property
    def costs(self) -> ReplicaCosts:
        return ReplicaCosts(self.spec, self.gpu, self.cluster, self.budget, self.measured, self.endpoint)

    @property
    def deployments(self) -> Deployments:
        return Deployments(self.spec.path, self.cluster, self.budget, self.cached_share > 0, self.swap_bytes)

    def choices(self, progress: Progress) -> list[Choice]:
        """The best first."""
        phases = [phase for tp, pp in self.degrees() if (phase := self.costs.phase(tp, pp)) is not None]
        if not phases:
            raise ConfigError(f"model {self.spec.path}: does not fit {self.cluster.num_gpus} such GPUs")
        demand = Demand(
            self.asks(self.num_requests),
            self.targets_ms,
            self.rate and MARGIN * self.rate,
            self.budget,
            self.cached_share,
            lasting_s=self.lasting_s,
        )
        task = progress.add_task("Phases", total=None)
        found = [
            each
            for each in candidates(
                self.cluster, demand, phases, self.spec.num_layers, self.costs.handoff_s, self.num_requests
            )
            if self.affinity in (each.affinity, "both") or self.cluster.num_nodes == 1
        ]
        found = best_of(found, demand)[:NUM_TOGETHER]
        progress.update(task, description="Both phases", total=len(found))
        tried = []
        for each in found:
            tried.append(meets_together(each, demand, partial(self.costs.handoff_s, each.affinity), self.num_requests))
            progress.advance(task)
        return self.judged(best_of(tried, demand), demand, progress)

    def judged(self, placements: list[Placement], demand: Demand, progress: Progress) -> list[Choice]:
        """The best placements and colocated replicas by the router; then the rest as the phases have them, which know
        less of what goes wrong."""
        choices = [self.choice(each) for each in placements]
        trials: list[tuple[Choice, Trial]] = []
        for each, choice in list(zip(placements, choices, strict=True))[: self.num_verified]:
            degrees = (each.prefill.tp, each.prefill.pp), (each.decode.tp, each.decode.pp)
            prefill_costs, costs = (self.costs.of_a_place(*pair) for pair in degrees)
            raw = self.deployments.virtual(each.num_prefill, each.num_decode, {}, each.prefill.pp, each.decode.pp)
            number = each.num_prefill + each.num_decode
            trials.append((choice, self.trial(raw, costs, prefill_costs, number, 1.4 * each.goodput)))
        if trials:
            choice, trial = trials[0]
            auto = {"scheduler": {"roles": "auto", **self.served_targets}}
            same = replace(choice, name=f"{choice.name}, roles auto", deployment=choice.deployment | auto)
            trials.insert(1, (same, replace(trial, deployment=trial.deployment | auto, upper=2 * trial.upper)))
        with trying(self.jobs) as rates_of:
            trials += self.colocated(rates_of)
            task = progress.add_task("By the router", total=len(trials))
            judged = []
            for (choice, _), rate in zip(trials, rates_of([trial for _, trial in trials]), strict=True):
                judged.append(replace(choice, goodput=rate, judged_by="router"))
                progress.advance(task)
        known = {choice.name for choice in judged}
        every = [each for each in judged + [each for each in choices if each.name not in known] if each.goodput > 0]
        if self.rate is None:
            return sorted(every, key=lambda each: (each.judged_by != "router", -each.goodput, each.num_gpus))
        enough = [each for each in every if each.goodput >= self.rate]
        return sorted(enough, key=lambda each: (each.judged_by != "router", each.num_gpus, -each.goodput))

    def colocated(self, rates_of: RatesOf) -> list[tuple[Choice, Trial]]:
        """Mixed replicas at the best of several chunks for each degree, as many as the rate needs, or all: one replica
        says little of two degrees, for many small ones share what comes in bursts as a large one does."""
        ways = [
            (tp, chunk, costs)
            for tp in sorted({tp for tp, pp in self.degrees() if pp == 1})
            if tp <= self.cluster.num_gpus and (costs := self.costs.of(tp)) is not None
            for chunk in self.chunks
        ][: 2 * len(self.chunks)]
        alone = [self.mixed(1, tp, chunk, costs, 64.0) for tp, chunk, costs in ways]
        rates = rates_of([trial for _, trial in alone])
        found = {way[0]: (rate, way) for rate, way in sorted(zip(rates, ways, strict=True), key=itemgetter(0))}
        chosen = []
        for rate, (tp, chunk, costs) in found.values():
            most = self.cluster.num_gpus // tp
            number = most if self.rate is None or not rate else min(most, -int(-MARGIN * self.rate // rate))
            chosen.append(self.mixed(number, tp, chunk, costs, 1.4 * rate * number))
        return [each for each, (rate, _) in zip(chosen, found.values(), strict=True) if rate]

    def mixed(self, number: int, tp: int, chunk: int, costs: Costs, upper: float) -> tuple[Choice, Trial]:
        deployment = self.deployments.colocated(number, tp, chunk)
        choice = Choice(f"{number} x tp{tp}, colocated, chunk {chunk}", number * tp, 0.0, "router", deployment)
        raw = self.deployments.virtual(0, number, {"local_prefill_tokens": chunk})
        return choice, self.trial(raw, costs, None, number, upper)

    def choice(self, placement: Placement) -> Choice:
        name = placement.name if self.cluster.num_nodes > 1 else placement.name.rpartition(",")[0]
        deployment = self.deployments.disaggregated(placement)
        return Choice(name, placement.num_gpus, placement.goodput, placement.judged_by, deployment)

    def degrees(self) -> list[tuple[int, int]]:
        if "tensor_parallel_size" not in StageConfig.model_fields:
            return [(1, 1)]
        return degrees(self.spec.num_heads, self.spec.num_layers, self.cluster)

    @property
    def lasting_s(self) -> float:
        """Of the arrivals of a trial."""
        lengths, _ = self.load(self.num_requests)
        gap_ms = min((self.targets_ms[metric] for metric in ("itl", "tpot") if metric in self.targets_ms), default=0.0)
        answer_ms = gap_ms * mean(output for _, output in lengths)
        return max(self.lasting * self.targets_ms.get("ttft", 0.0), self.lives * answer_ms) / 1e3

    @property
    def served_targets(self) -> dict[str, float]:
        """Those that a deployment can be told."""
        return {f"{metric}_target_ms": ms for metric, ms in self.targets_ms.items() if metric in SERVED_TARGETS}

    # ---- the load

    def asks(self, most: int) -> Callable[[float, int], list[Ask]]:
        """The same requests at every rate, in the same pattern of arrivals."""
        lengths, times = self.load(MOST_TIMES * most)
        return lambda rate, number: [
            Ask(at / rate, *each) for at, each in zip(times[:number], lengths[:number], strict=True)
        ]

    def load(self, number: int) -> tuple[list[tuple[int, int]], list[float]]:
        rng = random.Random(0)
        asked = self.workload.draw(number, rng)
        limit = self.spec.max_model_len
        lengths = [(min(each.lengths.prompt, limit - 2), each.lengths.output) for each in asked]
        lengths = [(prompt, max(1, min(output, limit - prompt))) for prompt, output in lengths]
        return lengths, arrivals(number, 1.0, 1.0, rng)

    def trial(self, raw: dict[str, Any], costs: Costs, prefill: Costs | None, num_replicas: int, upper: float) -> Trial:
        lengths, times = self.load(2 * MAX_REQUESTS)
        number = min(MAX_REQUESTS, max(self.num_requests, 20 * num_replicas))
        return Trial(
            raw, costs, prefill, lengths, times, self.targets_ms, upper, number, self.lasting_s, self.cached_share
        )


@contextmanager
def trying(jobs: int) -> Iterator[RatesOf]:
    """The goodput of each of some trials, so many at a time."""
    if jobs == 1:
        yield lambda trials: [goodput_of(trial) for trial in trials]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield lambda trials: list(pool.map(goodput_of, trials))


def best_of(placements: list[Placement], demand: Demand) -> list[Placement]:
    """The best first, by what `better` says."""
    ordered: list[Placement] = []
    for each in placements:
        index = next((index for index, other in enumerate(ordered) if better(each, other, demand)), len(ordered))
        ordered.insert(index, each)
    return ordered
