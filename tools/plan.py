"""Plans a deployment: degrees, numbers and roles of replicas for a model, a cluster, a workload and targets.

    python -m tools.plan --model DIR --gpu h100 --nodes 1 --gpus-per-node 8 --dataset-name chat \
        --goodput ttft:250 itl:40 --request-rate 20 --out planned.yaml
    make serve DEPLOYMENT=planned.yaml

DistServe's placement search (tools/planning/search.py) for high and low node affinity, with transfers, prefix hits and
swapping in what it simulates; colocated replicas at several chunks are tried too. The best few are judged by the real
router and engine loops in virtual time. Steps are predicted from rates of the GPU, or fitted to --costs of
tools.simulate, and so are as good as these.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer import Argument, Option

from ensemble.config import StageConfig
from ensemble.errors import ConfigError
from ensemble.models.spec import ModelSpec, load_model_spec
from tools.bench_goodput import SERVED_TARGETS
from tools.command_line import run
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.load.records import describe, parse_targets
from tools.load.workloads import DATASETS, Workload, arrivals
from tools.planning.phases import Phase
from tools.planning.search import MOST_TIMES, Cluster, Demand, Placement, better, candidates, degrees, meets_together
from tools.planning.verify import Trial, goodput_of
from tools.simulation.costs import GPUS, Costs, Gpu, costs_by_rates, kv_tokens, model_size, read_costs, step_s
from tools.simulation.simulator import Ask

KNOWN_TARGETS = ("ttft", "tpot", "itl", "gap")
MAX_REQUESTS = 1500  # of a trial by the router
NUM_TOGETHER = 12  # of the best placements: tried with both phases
MARGIN = 1.1  # of the rate that is asked for
UTILIZATION = 0.9


RatesOf = Callable[[list[Trial]], list[float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to use the cluster, and what it can do."""

    name: str
    num_gpus: int
    goodput: float
    judged_by: str
    deployment: dict[str, Any]


def main(
    more_goodput: Annotated[list[str] | None, Argument(hidden=True)] = None,
    model: Annotated[str | None, Option(envvar="MODEL", help="directory or Hub name; config.json is enough")] = None,
    gpu: Annotated[str, Option(help=", ".join(GPUS))] = "h100",
    nodes: Annotated[int, Option(min=1)] = 1,
    gpus_per_node: Annotated[int, Option(min=1)] = 8,
    gpu_memory: Annotated[float | None, Option(min=1, help="GiB of a GPU, where it is not that of its kind")] = None,
    link_rate: Annotated[float | None, Option(min=0.1, help="GB/s between two GPUs of a node")] = None,
    network_rate: Annotated[float, Option(min=0.01, help="GB/s between nodes, for each GPU")] = 25.0,
    affinity: Annotated[str, Option(help="high, low or both")] = "both",
    costs: Annotated[Path | None, Option(help="JSON file of tools.simulate --measure, of one such GPU")] = None,
    request_rate: Annotated[float | None, Option(min=0.001, help="a second; none: as many as the cluster can")] = None,
    goodput: Annotated[list[str] | None, Option(help=f"METRIC:MS ...: {', '.join(KNOWN_TARGETS)}")] = None,
    dataset_name: Annotated[str, Option(help=", ".join(DATASETS))] = "chat",
    dataset_path: Annotated[Path | None, Option(help="of a trace: CSV or JSONL")] = None,
    input_len: Annotated[int, Option(min=1)] = 512,
    output_len: Annotated[int | None, Option(min=1)] = None,
    range_ratio: Annotated[float, Option(min=0, max=1)] = 0.0,
    prefix_hit_share: Annotated[float, Option(min=0, max=0.95, help="of a prompt, found in prefix caches")] = 0.0,
    swap_space: Annotated[float, Option(min=0, help="GiB of host memory of each decode replica")] = 0.0,
    out: Annotated[Path, Option(help="the deployment file")] = Path("planned.yaml"),
    jobs: Annotated[int | None, Option(min=1, help="trials at a time; default: the cores")] = None,
    alternatives: Annotated[int, Option(min=0, help="runners-up that get files beside it")] = 0,
) -> None:
    targets_ms = parse_targets([*(goodput or []), *(more_goodput or [])]) or {"ttft": 1000.0, "itl": 100.0}
    for metric in targets_ms:
        if metric not in KNOWN_TARGETS:
            raise ConfigError(f"--goodput {metric}: a plan knows {', '.join(KNOWN_TARGETS)}")
    if gpu not in GPUS or affinity not in ("high", "low", "both"):
        raise ConfigError(f"--gpu {gpu}, --affinity {affinity}: must be of {', '.join(GPUS)}; high, low or both")
    path = resolve_model(model) if model else ensure_default_model()
    kind = GPUS[gpu]
    kind = replace(
        kind,
        memory_bytes=int(gpu_memory * 2**30) if gpu_memory else kind.memory_bytes,
        link_rate=link_rate * 1e9 if link_rate else kind.link_rate,
    )
    cluster = Cluster(nodes, gpus_per_node, kind.link_rate, network_rate * 1e9)
    workload = Workload(dataset_name, dataset_path, input_len, output_len, range_ratio)
    plan = Plan(
        load_model_spec(path),
        kind,
        cluster,
        workload,
        targets_ms,
        request_rate,
        measured=read_costs(costs) if costs else None,
        cached_share=prefix_hit_share,
        swap_bytes=int(swap_space * 2**30),
        affinity=affinity,
        jobs=jobs or os.cpu_count() or 1,
    )
    console = Console(width=130, highlight=False)
    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        choices = plan.choices(progress)
    if not choices:
        wanted = f"{request_rate:g} requests a second" if request_rate else "any rate"
        raise ConfigError(f"no placement on {cluster.num_gpus} GPUs keeps {describe(targets_ms)} at {wanted}")
    console.print(table_of(choices, targets_ms, time.monotonic() - started))
    for number, choice in enumerate(choices[: 1 + alternatives]):
        file = out if number == 0 else out.with_stem(f"{out.stem}-{number + 1}")
        heading = f"# {choice.name}: {choice.goodput:.2f} requests/s, judged by {choice.judged_by}\n"
        file.write_text(heading + yaml.safe_dump(choice.deployment, sort_keys=False), encoding="utf-8")
        console.print(f"{choice.name}: {file}", soft_wrap=True)


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
    budget: int = 2048
    num_requests: int = 400  # of a trial of one replica
    lasting: float = 30.0  # times the TTFT target: what comes 4 % too fast has by then a queue as long as that
    num_verified: int = 6  # of the best placements: tried by the router
    jobs: int = 1  # trials at a time
    chunks: tuple[int, ...] = (256, 512, 2048)  # of colocated replicas

    def choices(self, progress: Progress) -> list[Choice]:
        """The best first."""
        phases = [phase for tp, pp in self.degrees() if (phase := self.phase(tp, pp)) is not None]
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
                self.cluster, demand, phases, self.spec.num_layers, self.handoff_s, self.num_requests
            )
            if self.affinity in (each.affinity, "both") or self.cluster.num_nodes == 1
        ]
        found = best_of(found, demand)[:NUM_TOGETHER]
        progress.update(task, description="Both phases", total=len(found))
        tried = []
        for each in found:
            tried.append(meets_together(each, demand, partial(self.handoff_s, each.affinity), self.num_requests))
            progress.advance(task)
        return self.judged(best_of(tried, demand), demand, progress)

    def judged(self, placements: list[Placement], demand: Demand, progress: Progress) -> list[Choice]:
        """The best placements and colocated replicas by the router; then the rest as the phases have them, which know
        less of what goes wrong."""
        choices = [self.choice(each) for each in placements]
        trials: list[tuple[Choice, Trial]] = []
        for each, choice in list(zip(placements, choices, strict=True))[: self.num_verified]:
            degrees = (each.prefill.tp, each.prefill.pp), (each.decode.tp, each.decode.pp)
            prefill_costs, costs = (self.place_costs(*pair) for pair in degrees)
            raw = self.virtual(each.num_prefill, each.num_decode, {}, each.prefill.pp, each.decode.pp)
            number = each.num_prefill + each.num_decode
            trials.append((choice, self.trial(raw, costs, prefill_costs, number, 1.4 * each.goodput)))
        if trials and trials[0][0].deployment["mode"] == "disaggregated":
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
        """Mixed replicas at the two best of several chunks and degrees, as many as the rate needs, or all."""
        ways = [
            (tp, chunk, costs)
            for tp in sorted({tp for tp, pp in self.degrees() if pp == 1})
            if tp <= self.cluster.num_gpus and (costs := self.costs(tp)) is not None
            for chunk in self.chunks
        ][: 2 * len(self.chunks)]
        alone = [self.mixed(1, tp, chunk, costs, 64.0) for tp, chunk, costs in ways]
        rates = rates_of([trial for _, trial in alone])
        found = sorted(zip(rates, ways, strict=True), key=lambda each: -each[0] / each[1][0])[:2]
        chosen = []
        for rate, (tp, chunk, costs) in found:
            most = self.cluster.num_gpus // tp
            number = most if self.rate is None or not rate else min(most, -int(-MARGIN * self.rate // rate))
            chosen.append(self.mixed(number, tp, chunk, costs, 1.2 * rate * number))
        return [each for each, (rate, _) in zip(chosen, found, strict=True) if rate]

    def mixed(self, number: int, tp: int, chunk: int, costs: Costs, upper: float) -> tuple[Choice, Trial]:
        decode = {"local_prefill_tokens": chunk}
        deployment = self.deployment("colocated", (tp, 1), (tp, 1), [], list(range(number * tp)), decode)
        choice = Choice(f"{number} x tp{tp}, colocated, chunk {chunk}", number * tp, 0.0, "router", deployment)
        return choice, self.trial(self.virtual(0, number, decode), costs, None, number, upper)

    def degrees(self) -> list[tuple[int, int]]:
        if "tensor_parallel_size" not in StageConfig.model_fields:
            return [(1, 1)]
        return degrees(self.spec.num_heads, self.spec.num_layers, self.cluster)

    @property
    def lasting_s(self) -> float:
        """Of the arrivals of a trial."""
        return self.lasting * self.targets_ms.get("ttft", 0.0) / 1e3

    @property
    def served_targets(self) -> dict[str, float]:
        """Those that a deployment can be told."""
        return {f"{metric}_target_ms": ms for metric, ms in self.targets_ms.items() if metric in SERVED_TARGETS}

    # ---- what things cost

    def phase(self, tp: int, pp: int) -> Phase | None:
        """None: the model does not fit."""
        num_kv_tokens = kv_tokens(model_size(self.spec), self.gpu, tp * pp, UTILIZATION)
        costs = self.costs(tp, pp)
        return None if costs is None else Phase(tp, pp, costs.times, num_kv_tokens)

    def costs(self, tp: int, pp: int = 1) -> Costs | None:
        """Of a replica on tp GPUs; None: the model does not fit tp x pp."""
        size = model_size(self.spec)
        num_kv_tokens = kv_tokens(size, self.gpu, tp * pp, UTILIZATION)
        if num_kv_tokens < 2048:
            return None
        found = costs_by_rates(size, self.gpu, tp, num_kv_tokens, self.budget, self.spec.max_model_len)
        if self.measured is None:
            return found
        if tp == pp == 1:
            noise = {"step_ratios": found.step_ratios, "response_s": found.response_s}
            return msgspec.structs.replace(self.measured, num_kv_tokens=num_kv_tokens, **noise)
        ratios = [step.seconds / step_s(size, self.gpu, step.shape, 1) for step in self.measured.steps]
        return found.scaled(median(ratios))

    def place_costs(self, tp: int, pp: int) -> Costs:
        """Of a replica that was placed, by what a place of its pipeline takes."""
        costs = self.costs(tp, pp)
        assert costs is not None, "it was placed"
        return costs.scaled(1 / pp)

    def handoff_s(self, affinity: str, prompt_len: int) -> float:
        rate = self.gpu.link_rate if affinity == "low" else min(self.gpu.link_rate, self.cluster.network_rate)
        return model_size(self.spec).kv_token_bytes * prompt_len / (0.8 * rate)

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

    # ---- deployments

    def choice(self, placement: Placement) -> Choice:
        prefill, decode = placement.prefill, placement.decode
        devices = layout(placement, self.cluster)
        deployment = self.deployment(
            "disaggregated", (prefill.tp, prefill.pp), (decode.tp, decode.pp), devices[0], devices[1], {}
        )
        name = placement.name if self.cluster.num_nodes > 1 else placement.name.rpartition(",")[0]
        return Choice(name, placement.num_gpus, placement.goodput, placement.judged_by, deployment)

    def deployment(
        self,
        mode: str,
        prefill: tuple[int, int],
        decode: tuple[int, int],
        prefill_devices: list[int],
        decode_devices: list[int],
        fields: dict[str, Any],
    ) -> dict[str, Any]:
        """As it is written to the file; a degree of 1 is left out."""
        raw: dict[str, Any] = {"mode": mode, "model": {"path": str(self.spec.path)}, **self.common(fields)}
        raw["prefill"] |= {"devices": [f"cuda:{index}" for index in prefill_devices]}
        raw["decode"] |= {"devices": [f"cuda:{index}" for index in decode_devices]}
        if mode == "disaggregated":
            raw["scheduler"] = {"roles": "fixed"}  # else `make serve` would take auto
        for stage, (tp, pp) in (("prefill", prefill), ("decode", decode)):
            if mode == "disaggregated" or stage == "decode":
                raw[stage] |= {"tensor_parallel_size": tp} if tp > 1 else {}
                raw[stage] |= {"pipeline_parallel_size": pp} if pp > 1 else {}
        if self.cluster.num_nodes > 1:
            raw["launcher"] = "ray"
        return raw

    def virtual(
        self, num_prefill: int, num_decode: int, fields: dict[str, Any], prefill_pp: int = 1, decode_pp: int = 1
    ) -> dict[str, Any]:
        """The same as the router sees it: a device for each place of a replica."""
        raw: dict[str, Any] = {
            "mode": "disaggregated" if num_prefill else "colocated",
            "model": {"path": str(self.spec.path)},
            **self.common(fields),
        }
        first = num_prefill * prefill_pp
        raw["prefill"] |= {"devices": [f"cuda:{index}" for index in range(first)]}
        raw["decode"] |= {"devices": [f"cuda:{first + index}" for index in range(num_decode * decode_pp)]}
        raw["prefill"] |= {"pipeline_parallel_size": prefill_pp} if prefill_pp > 1 else {}
        raw["decode"] |= {"pipeline_parallel_size": decode_pp} if decode_pp > 1 else {}
        return raw

    def common(self, decode: dict[str, Any]) -> dict[str, Any]:
        swapping = {"policy": "sj-mlfq", "host_kv_bytes": self.swap_bytes} if self.swap_bytes else {}
        prefill = {"prefix_cache": True} if self.cached_share else {}
        stage = {"max_num_batched_tokens": self.budget} | prefill
        return {"prefill": stage, "decode": {**decode, **swapping}, "block_size": 64}


@contextmanager
def trying(jobs: int) -> Iterator[RatesOf]:
    """The goodput of each of some trials, so many at a time."""
    if jobs == 1:
        yield lambda trials: [goodput_of(trial) for trial in trials]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield lambda trials: list(pool.map(goodput_of, trials))


def layout(placement: Placement, cluster: Cluster) -> tuple[list[int], list[int]]:
    """GPUs of prefill and of decode, replica by replica, each in the order of its places: numbered over all nodes.

    Low affinity: a group of `places` nodes has the same replicas as any other, of which place i lies on its node i.
    """
    prefill, decode = placement.prefill, placement.decode
    if placement.affinity == "high" or cluster.num_nodes == 1:
        num_prefill = placement.num_prefill * prefill.num_gpus
        return list(range(num_prefill)), list(range(num_prefill, placement.num_gpus))
    per_node, places = cluster.gpus_per_node, placement.places
    group = per_node * places
    share = placement.num_prefill * prefill.num_gpus + placement.num_decode * decode.num_gpus
    num_groups = next(
        number
        for number in range(1, cluster.num_nodes // places + 1)
        if share // number <= group and not placement.num_prefill % number and not placement.num_decode % number
    )
    devices: tuple[list[int], list[int]] = [], []
    for number in range(num_groups):
        taken = [0] * places  # GPUs of each node of the group
        for kind, (phase, count) in enumerate(((prefill, placement.num_prefill), (decode, placement.num_decode))):
            for _ in range(count // num_groups):
                for place in range(phase.pp):
                    node = place * places // phase.pp
                    first = number * group + node * per_node + taken[node]
                    devices[kind].extend(range(first, first + phase.tp))
                    taken[node] += phase.tp
    return devices


def best_of(placements: list[Placement], demand: Demand) -> list[Placement]:
    """The best first, by what `better` says."""
    ordered: list[Placement] = []
    for each in placements:
        index = next((index for index, other in enumerate(ordered) if better(each, other, demand)), len(ordered))
        ordered.insert(index, each)
    return ordered


def table_of(choices: list[Choice], targets_ms: dict[str, float], seconds: float) -> Table:
    table = Table(title=f"{describe(targets_ms)}; planned in {seconds:.0f} s", title_justify="left")
    for heading in ("placement (prefill | decode)", "GPUs", "goodput", "per GPU", "judged by"):
        table.add_column(heading, justify="left" if heading.startswith("placement") else "right")
    for choice in choices[:10]:
        per_gpu = f"{choice.goodput / choice.num_gpus:.3f}/s"
        table.add_row(choice.name, str(choice.num_gpus), f"{choice.goodput:.2f}/s", per_gpu, choice.judged_by)
    return table


if __name__ == "__main__":
    run(main)
