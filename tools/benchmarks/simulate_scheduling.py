"""What the scheduling policies gain, in virtual time: the real schedulers, a cost model instead of a GPU.

    python -m tools.benchmarks.simulate_scheduling            writes docs/results/scheduling.json

Times are those that DistServe's authors fitted for OPT-13B on one A100-80GB (prefill and decode, in ms; simdistserve in
their repository); swaps and hand-offs move 12.5 MiB a block at the bandwidths below. Seeds are fixed: the same numbers
come out on every machine.
"""

import heapq
import json
import platform
import random
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ensemble.cache.block_manager import BlockManager, Owner, Swap, SwappableBlocks
from ensemble.config import DecodePolicyName, PolicyName
from ensemble.replicas.preemptive_decode import PreemptiveDecodeScheduler
from ensemble.request import Request, SamplingParams, Sequence
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler

BLOCK_SIZE = 16
BLOCK_BYTES = int(12.5 * 2**20)  # OPT-13B, fp16
SWAP_BYTES_PER_S = 25e9  # pinned host memory over PCIe 4, each direction
HANDOFF_BYTES_PER_S = 200e9  # NVLink


def prefill_s(prompt_lens: list[int]) -> float:
    return (18.1 + 0.1019 * sum(prompt_lens) + 7.12e-6 * sum(length**2 for length in prompt_lens)) / 1e3


def decode_s(context_lens: list[int]) -> float:
    return (19.93 + 6.27e-4 * sum(context_lens) + 0.0385 * len(context_lens)) / 1e3


@dataclass(frozen=True)
class Job:
    arrival_s: float
    prompt_len: int
    num_output_tokens: int
    hints: Hints = field(default_factory=Hints)

    def request(self, request_id: int) -> Request:
        sampling = SamplingParams(max_tokens=self.num_output_tokens, ignore_eos=True)
        return Request(request_id=request_id, prompt_token_ids=[0] * self.prompt_len, sampling=sampling)


def bounded(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


# ---- decode


def heavy_tailed_jobs(seed: int, num_jobs: int, rate_per_s: float) -> list[Job]:
    """Poisson arrivals; prompts log-normal, outputs Pareto with shape 1.1: most are short, a few are very long."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for _ in range(num_jobs):
        now += rng.expovariate(rate_per_s)
        prompt_len = bounded(rng.lognormvariate(5.0, 1.0), 4, 1024)
        jobs.append(Job(now, prompt_len, bounded(16 * rng.paretovariate(1.1), 2, 1024)))
    return jobs


class DecodeSimulation:
    """One decode engine. Prefilled sequences wait in order for blocks; swaps have one stream a direction."""

    def __init__(
        self, policy: DecodePolicySettings, *, num_blocks: int, num_host_blocks: int, max_num_seqs: int
    ) -> None:
        self.makes_room_for_newcomers = policy.name != "fcfs"  # there they come last anyway
        self.blocks = SwappableBlocks(BlockManager(num_blocks, BLOCK_SIZE), BlockManager(num_host_blocks, BLOCK_SIZE))
        self.scheduler = PreemptiveDecodeScheduler(self.blocks, make_decode_policy(policy), max_num_seqs=max_num_seqs)
        self.bridge: deque[Request] = deque()
        self.lives: dict[int, int] = {}  # request_id |-> blocks at its full length
        self.copies: list[tuple[float, int]] = []  # (end, request_id)
        self.stream_free_s = {"out": 0.0, "in": 0.0}
        self.num_swaps = 0
        self.now = 0.0

    def run(self, jobs: list[Job]) -> list[float]:
        """Returns the completion time in seconds of every job."""
        completion_s = [0.0] * len(jobs)
        arrivals = deque(enumerate(jobs))
        while arrivals or self.bridge or len(self.scheduler):
            while arrivals and arrivals[0][1].arrival_s <= self.now:
                request_id, job = arrivals.popleft()
                self.bridge.append(job.request(request_id))
            while self.copies and self.copies[0][0] <= self.now:
                self.scheduler.swap_ended(heapq.heappop(self.copies)[1])
            self.admit()
            plan = self.scheduler.next_plan(self.now, self.num_wanted_blocks())
            self.start_copies("out", plan.swap_out)
            self.start_copies("in", plan.swap_in)
            if not plan.run:
                self.now = min([each[0] for each in self.copies[:1]] + [job.arrival_s for _, job in list(arrivals)[:1]])
                continue
            seconds = decode_s([sequence.num_tokens for sequence in plan.run])
            self.now += seconds
            for sequence in plan.run:
                sequence.num_computed_tokens += 1
                sequence.append(0, frozenset())
            self.scheduler.ran(seconds, self.now)
            for sequence in plan.run:
                if sequence.is_finished:
                    self.scheduler.remove(sequence.request_id)
                    del self.lives[sequence.request_id]
                    completion_s[sequence.request_id] = self.now - jobs[sequence.request_id].arrival_s
        return completion_s

    def num_wanted_blocks(self) -> int:
        if not self.bridge or not self.makes_room_for_newcomers:
            return 0
        return self.blocks.device.blocks_for(self.bridge[0].prompt_len + 1)

    def admit(self) -> None:
        """Pulls from the bridge while there are blocks, and all that are here can be brought to their end."""
        device, host = self.blocks.device, self.blocks.host
        while self.bridge:
            request = self.bridge[0]
            num_blocks = device.blocks_for(request.prompt_len + 1)
            life = device.blocks_for(request.max_num_kv_tokens)
            lives = [*self.lives.values(), life]
            if num_blocks > device.num_free_blocks or sum(lives) + max(lives) > device.num_blocks + host.num_blocks:
                return
            self.bridge.popleft()
            self.lives[request.request_id] = life
            sequence = Sequence(request, [0], request.prompt_len)
            sequence.block_ids = device.allocate(Owner("sequence", request.request_id), num_blocks)
            num_bytes = num_blocks * BLOCK_BYTES
            join_cost_s = num_bytes / HANDOFF_BYTES_PER_S + num_bytes / SWAP_BYTES_PER_S
            self.scheduler.add(sequence, self.now, join_cost_s=join_cost_s)

    def start_copies(self, way: str, swaps: list[Swap]) -> None:
        for swap in swaps:
            start_s = max(self.now, self.stream_free_s[way])
            self.stream_free_s[way] = start_s + len(swap.source_block_ids) * BLOCK_BYTES / SWAP_BYTES_PER_S
            heapq.heappush(self.copies, (self.stream_free_s[way], swap.request_id))
            self.num_swaps += 1


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def simulate_decode(name: DecodePolicyName, jobs: list[Job]) -> dict[str, float]:
    policy = DecodePolicySettings(name, quantum_s=0.02, starvation_s=30.0)
    simulation = DecodeSimulation(policy, num_blocks=700, num_host_blocks=4000, max_num_seqs=16)
    completion_s = simulation.run(jobs)
    per_token_s = [seconds / job.num_output_tokens for seconds, job in zip(completion_s, jobs, strict=True)]
    return {
        "mean completion time": statistics.mean(completion_s),
        "P99 completion time per output token": percentile(per_token_s, 0.99),
        "swaps": simulation.num_swaps,
    }


# ---- prefill


def mixed_target_jobs(seed: int, num_jobs: int, rate_per_s: float) -> list[Job]:
    """Poisson arrivals; seven of ten want their first token in 0.5 s, the others in 10 s."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for _ in range(num_jobs):
        now += rng.expovariate(rate_per_s)
        target_s = 0.5 if rng.random() < 0.7 else 10.0
        prompt_len = bounded(rng.lognormvariate(5.5, 1.0), 4, 2000)
        jobs.append(Job(now, prompt_len, 1, Hints(ttft_target_s=target_s)))
    return jobs


def simulate_prefill(name: PolicyName, jobs: list[Job]) -> float:
    """Returns the share of jobs whose first token came in time."""
    scheduler = PrefillScheduler(
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        max_batches_in_flight=1,
        max_queue_requests=len(jobs),
        max_queue_tokens=sum(job.prompt_len for job in jobs),
        policy=QueuePolicy(name, max_wait_s=30.0),
    )
    scheduler.replica_up(0, Credits(5000), scheduler.limits)
    arrivals = deque(enumerate(jobs))
    num_in_time, now = 0, 0.0
    while arrivals or scheduler.num_waiting:
        while arrivals and arrivals[0][1].arrival_s <= now:
            request_id, job = arrivals.popleft()
            scheduler.add(job.request(request_id), now, job.hints)
        batch = scheduler.next_batch(now, lambda replica, request: True)
        if batch is None:
            now = arrivals[0][1].arrival_s
            continue
        now += prefill_s([chunk.length for chunk in batch.chunks])
        scheduler.batch_done(0, batch.batch_id)
        for chunk in batch.chunks:
            job = jobs[chunk.request_id]
            if chunk.start + chunk.length == job.prompt_len:
                scheduler.released(0, [chunk.request_id])
                num_in_time += now - job.arrival_s <= (job.hints.ttft_target_s or 0)
    return num_in_time / len(jobs)


# ---- results


def row(name: str, value: float, unit: str, goal: str = "", met: bool | None = None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "unit": unit, "goal": goal or None, "met": met}


def decode_rows(num_jobs: int, seeds: range) -> list[dict[str, Any]]:
    rows = []
    for rate_per_s in (9.0, 10.5):
        fcfs: dict[str, float] = {}
        for name in ("fcfs", "srpt", "mlfq", "sj-mlfq"):
            runs = [simulate_decode(name, heavy_tailed_jobs(seed, num_jobs, rate_per_s)) for seed in seeds]
            for metric in runs[0]:
                value = statistics.mean(run[metric] for run in runs)
                unit = "swaps" if metric == "swaps" else "s"
                label = f"decode {name}, {rate_per_s:g} requests/s: {metric}"
                if name == "fcfs":
                    fcfs[metric] = value
                if name == "sj-mlfq" and unit == "s":
                    rows.append(row(label, value, unit, f"< {fcfs[metric]:.4f} (fcfs)", value < fcfs[metric]))
                else:
                    rows.append(row(label, value, unit))
    return rows


def prefill_rows(num_jobs: int, seeds: range) -> list[dict[str, Any]]:
    rows = []
    for rate_per_s in (16.0, 18.0, 20.0):
        fcfs = 0.0
        for name in ("fcfs", "sjf", "edf"):
            value = statistics.mean(
                simulate_prefill(name, mixed_target_jobs(seed, num_jobs, rate_per_s)) for seed in seeds
            )
            label = f"prefill {name}, {rate_per_s:g} requests/s: TTFT attainment"
            if name == "fcfs":
                fcfs = value
            if name == "edf":
                rows.append(row(label, value, "share", f"> {fcfs:.4f} (fcfs)", value > fcfs))
            else:
                rows.append(row(label, value, "share"))
    return rows


def main(out: Path = Path("docs/results/scheduling.json"), num_jobs: int = 2000, num_seeds: int = 3) -> None:
    rows = decode_rows(num_jobs, range(num_seeds)) + prefill_rows(num_jobs, range(num_seeds))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    results = {
        "device": "none: virtual time, cost model of OPT-13B on one A100-80GB",
        "versions": {"python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "command": "python -m tools.benchmarks.simulate_scheduling " + " ".join(sys.argv[1:]),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for each in rows:
        print(f"{each['name']:72s} {each['value']:10.4f} {each['unit']:6s} {each['goal'] or ''}")


if __name__ == "__main__":
    typer.run(main)
