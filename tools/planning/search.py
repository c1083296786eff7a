"""DistServe's placement search.

Each phase alone: the rate that one replica of each pair of degrees (tensor x pipeline) keeps the targets at, by
bisection over a fast simulation. Then pairs of them with as many replicas of each as the rate needs, or the cluster
holds. The best few are tried together: a request meets its targets only if it meets all of them.

    high affinity   any replica may hand off to any other, over the slowest link between them: of the network where the
                    cluster has several nodes; a pipeline may cross nodes
    low affinity    the replicas that hand off to each other share a node: over its link. Where one node is too small
                    for a pair, both are cut into the same places, and place i of both shares node i
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from ensemble.scheduling.estimator import StepShape
from tools.load.goodput import SHARE
from tools.planning.phases import MAX_NUM_SEQS, Decoded, Phase, decode, prefill
from tools.simulation.simulator import Ask

Affinity = Literal["high", "low"]
PRECISION = 0.02  # of a rate
MOST_TIMES = 8  # as many requests in a trial as in a short one
ROUND_TRIP_S = 6e-3  # of a request, its tokens and what is told of its hand-off, beside the steps
JOIN_STEPS = 2.0  # of decode, that a sequence waits for: the one that runs, and the one that is launched
TYPICAL_ROWS = 32  # of a decode step, while nothing is known of it


@dataclass(frozen=True, slots=True)
class Cluster:
    num_nodes: int
    gpus_per_node: int
    link_rate: float  # bytes a second between two GPUs of a node
    network_rate: float  # between two nodes, for each of their GPUs

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of the cluster. `asks(rate, number)` draws so many requests."""

    asks: Callable[[float, int], list[Ask]]
    targets_ms: dict[str, float]
    rate: float | None  # None: as much as the cluster can
    budget: int = 2048  # prompt tokens of a batch
    cached_share: float = 0.0  # of prompts, found in a prefix cache
    share: float = SHARE
    lasting_s: float = 0.0  # of arrivals, at least: what comes a little too fast has a queue by then


@dataclass(frozen=True, slots=True)
class Placement:
    """So many replicas of each phase. `places`: nodes over which a group of them is laid, 1 unless it is too large."""

    affinity: Affinity
    prefill: Phase
    decode: Phase
    num_prefill: int
    num_decode: int
    places: int = 1
    goodput: float = 0.0  # requests a second of all
    judged_by: str = "phases"

    @property
    def num_gpus(self) -> int:
        return self.num_prefill * self.prefill.num_gpus + self.num_decode * self.decode.num_gpus

    @property
    def per_gpu(self) -> float:
        return self.goodput / self.num_gpus

    @property
    def name(self) -> str:
        prefills = f"{self.num_prefill} x {self.prefill.name}"
        return f"{prefills} | {self.num_decode} x {self.decode.name}, {self.affinity}"


def degrees(num_heads: int, num_layers: int, cluster: Cluster) -> list[tuple[int, int]]:
    """(tp, pp): tp divides the heads and stays in a node, pp divides the layers."""
    tps = [tp for tp in (1, 2, 4, 8, 16) if num_heads % tp == 0 and tp <= cluster.gpus_per_node]
    pps = [pp for pp in (1, 2, 4, 8) if num_layers % pp == 0]
    return [(tp, pp) for tp in tps for pp in pps if tp * pp <= cluster.num_gpus]


def highest_rate(meets: Callable[[float], bool], upper: float, precision: float = PRECISION) -> float:
    """The highest rate that `meets`, within that part of it; 0 if none does. `upper`: no rate above it can."""
    low, high = 0.0, upper
    while high - low > precision * high:
        middle = (low + high) / 2 if low else high / 4
        if meets(middle):
            low = middle
        else:
            high = middle
        if high < upper / 200:  # of no use to anybody
            return 0.0
    return low


def prefill_rate(phase: Phase, demand: Demand, handoff_s: Callable[[int], float], number: int) -> float:
    """Requests a second at which a replica's first tokens keep the TTFT target."""
    lens = [ask.prompt_len for ask in demand.asks(1.0, number)]
    join_s = JOIN_STEPS * phase.steps.seconds(StepShape(0, 0, TYPICAL_ROWS, round(TYPICAL_ROWS * mean(lens))))
    target_s = demand.targets_ms.get("ttft", float("inf")) / 1e3 - ROUND_TRIP_S - join_s

    def meets(rate: float) -> bool:
        asks = demand.asks(rate, min(MOST_TIMES * number, max(number, int(demand.lasting_s * rate))))
        ends = prefill(asks, phase, demand.budget, demand.cached_share)
        late = [end + handoff_s(ask.prompt_len) - ask.due for end, ask in zip(ends, asks, strict=True)]
        return sum(each <= target_s for each in late) >= demand.share * len(asks)

    sample = demand.asks(1e-6, number)  # one at a time
    busy_s = sum(
        end - ask.due
        for end, ask in zip(prefill(sample, phase, demand.budget, demand.cached_share), sample, strict=True)
    )
    return highest_rate(meets, 1.5 * phase.pp * number / busy_s)


def decode_rate(phase: Phase, demand: Demand, number: int) -> float:
    """Requests a second at which a replica's sequences keep the ITL and TPOT targets, and find room."""
    wait_s = demand.targets_ms.get("ttft", float("inf")) / 1e3
    num_tokens = mean(ask.output_len for ask in demand.asks(1.0, number))
    alone_s = num_tokens * phase.steps.seconds(StepShape(0, 0, 1, 1))

    def meets(rate: float) -> bool:
        asks = demand.asks(rate, long_enough(rate, alone_s, number))
        found = decode([(ask.due, ask.prompt_len + 1, ask.output_len - 1) for ask in asks], phase)
        good = [
            within(each, demand.targets_ms) and each.joined - ask.due <= wait_s
            for each, ask in zip(found, asks, strict=True)
        ]
        return sum(good) >= demand.share * len(asks)

    return highest_rate(meets, phase.pp * MAX_NUM_SEQS / alone_s)


def long_enough(rate: float, alone_s: float, number: int) -> int:
    """Requests of a trial: several times as many as are there at once, so that most of it is no beginning."""
    return min(MOST_TIMES * number, max(number, int(6 * rate * alone_s)))


def within(found: Decoded, targets_ms: dict[str, float]) -> bool:
    values = {"itl": found.itl, "gap": found.longest_gap, "tpot": found.tpot}
    return all(1e3 * value <= targets_ms.get(metric, float("inf")) for metric, value in values.items())


def together(placement: Placement, demand: Demand, asks: Sequence[Ask], handoff_s: Callable[[int], float]) -> float:
    """The share of the requests that meet all targets, through prefill and then decode; replicas take turns."""
    num_prefill, num_decode = placement.num_prefill, placement.num_decode
    first: dict[int, float] = {}
    for replica in range(num_prefill):
        turn = range(replica, len(asks), num_prefill)
        ends = prefill([asks[index] for index in turn], placement.prefill, demand.budget, demand.cached_share)
        first |= dict(zip(turn, ends, strict=True))
    order = sorted(range(len(asks)), key=first.__getitem__)
    num_good = 0
    for replica in range(num_decode):
        mine = order[replica::num_decode]
        joins = [
            (first[index] + handoff_s(asks[index].prompt_len), asks[index].prompt_len + 1, asks[index].output_len - 1)
            for index in mine
        ]
        for index, found in zip(mine, decode(joins, placement.decode), strict=True):
            ttft_ms = 1e3 * (found.joined + JOIN_STEPS * found.tpot + ROUND_TRIP_S - asks[index].due)
            in_time = ttft_ms <= demand.targets_ms.get("ttft", float("inf"))
            num_good += in_time and within(found, demand.targets_ms)
    return num_good / len(asks)


def counts(cluster: Cluster, demand: Demand, first: Placement, rates: tuple[float, float]) -> Placement | None:
    """With as many replicas as the rate needs, or the cluster holds; None: it cannot be reached.

    rates: of one replica of prefill and of one of decode.
    """
    prefill_gpus, decode_gpus = first.prefill.num_gpus, first.decode.num_gpus
    size, times = cluster.num_gpus, 1
    if first.affinity == "low":  # the same in each group of nodes
        size, times = cluster.gpus_per_node * first.places, cluster.num_nodes // first.places
    best: Placement | None = None
    for num_prefill in range(1, (size - decode_gpus) // prefill_gpus + 1):
        for num_decode in range(1, (size - num_prefill * prefill_gpus) // decode_gpus + 1):
            each = min(num_prefill * rates[0], num_decode * rates[1])
            groups = times if demand.rate is None else max(1, -int(-demand.rate // each))
            if groups > times:
                continue
            found = replace(
                first, num_prefill=num_prefill * groups, num_decode=num_decode * groups, goodput=each * groups
            )
            if best is None or better(found, best, demand):
                best = found
    return best


def better(one: Placement, other: Placement, demand: Demand) -> bool:
    """Fewer GPUs for a given rate; else more requests a second. Of equals: the other of both."""
    if demand.rate is not None:
        return (one.num_gpus, -one.goodput) < (other.num_gpus, -other.goodput)
    return (-round(one.goodput, 6), one.num_gpus) < (-round(other.goodput, 6), other.num_gpus)


def candidates(
    cluster: Cluster,
    demand: Demand,
    phases: Sequence[Phase],
    num_layers: int,
    handoff_s: Callable[[str, int], float],
    number: int,
) -> Iterator[Placement]:
    """Every pair of degrees in its best numbers, by the phases' own rates."""
    slow, fast = (lambda length: handoff_s("high", length)), (lambda length: handoff_s("low", length))
    links: dict[Affinity, Callable[[int], float]] = {"low": fast}
    if cluster.num_nodes == 1:
        links = {"high": fast}
    else:
        links["high"] = slow
    decode_rates = {id(phase): decode_rate(phase, demand, number) for phase in phases}
    for affinity, link in links.items():
        prefill_rates = {id(phase): prefill_rate(phase, demand, link, number) for phase in phases}
        for one in phases:
            for other in phases:
                rates = prefill_rates[id(one)], decode_rates[id(other)]
                if min(rates) <= 0:
                    continue
                for places in range(1, cluster.num_nodes + 1) if affinity == "low" else (1,):
                    if one.pp % places or other.pp % places or cluster.num_nodes % places or num_layers % places:
                        continue
                    if affinity == "low" and (one.num_gpus + other.num_gpus) > cluster.gpus_per_node * places:
                        continue
                    found = counts(cluster, demand, Placement(affinity, one, other, 1, 1, places), rates)
                    if found is not None:
                        yield found


def meets_together(placement: Placement, demand: Demand, handoff_s: Callable[[int], float], number: int) -> Placement:
    """The same with the goodput of both phases together, and of requests that meet all targets."""
    num_tokens = mean(ask.output_len for ask in demand.asks(1.0, number))
    alone_s = num_tokens * placement.decode.steps.seconds(StepShape(0, 0, 1, 1))

    def meets(rate: float) -> bool:
        asks = demand.asks(
            rate, max(min(MOST_TIMES * number, int(demand.lasting_s * rate)), long_enough(rate, alone_s, number))
        )
        return together(placement, demand, asks, handoff_s) >= demand.share

    return replace(placement, goodput=highest_rate(meets, 1.3 * placement.goodput))
