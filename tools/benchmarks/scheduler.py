"""What one scheduling decision costs, by policy and size, on one core.

    python -m tools.benchmarks.scheduler

A prefill decision forms one batch of 2,048 tokens (prompts of 128 to 1,024 tokens) from a queue; a decode decision
plans an iteration of 256 sequences among all, with a few swaps, and accounts for it. Times are CPU time of the thread.
The goal is 1 ms with 10,000 queued and 1,000 running; ten times the size may cost little more than ten times as much.
"""

import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import typer

from ensemble.cache.block_manager import BlockManager, Owner, SwappableBlocks
from ensemble.config import DecodePolicyName, PolicyName
from ensemble.replicas.preemptive_decode import PreemptiveDecodeScheduler
from ensemble.request import Request, SamplingParams, Sequence
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler

BLOCK_SIZE = 16
NUM_DECISIONS = 100
GOAL_MS = 1.0


def make_request(rng: random.Random, request_id: int) -> Request:
    sampling = SamplingParams(max_tokens=rng.randint(600, 1000), ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=[0] * rng.randint(128, 1024), sampling=sampling)


def prefill_ms(name: PolicyName, num_queued: int) -> list[float]:
    """Milliseconds of each decision, the queue refilled between two."""
    rng = random.Random(0)
    scheduler = PrefillScheduler(
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        max_batches_in_flight=2,
        max_queue_requests=2 * num_queued,
        max_queue_tokens=2048 * num_queued,
        policy=QueuePolicy(name, max_wait_s=1e9),
        max_long_tokens=1024,
    )
    scheduler.replica_up(0, Credits(100_000), scheduler.limits)
    num_requests, times_ms = 0, []
    for decision in range(NUM_DECISIONS):
        while scheduler.num_waiting < num_queued:
            hints = Hints(rng.randrange(4), f"tenant-{rng.randrange(200)}", rng.choice([0.5, 2.0, 10.0]))
            scheduler.add(make_request(rng, num_requests), decision / 1000, hints)
            num_requests += 1
        start = time.thread_time()
        batch = scheduler.next_batch(decision / 1000, lambda replica, request: True)
        times_ms.append((time.thread_time() - start) * 1e3)
        assert batch is not None
        scheduler.batch_done(0, batch.batch_id)
        scheduler.released(0, [chunk.request_id for chunk in batch.chunks])
    return times_ms


def decode_ms(name: DecodePolicyName, num_running: int) -> list[float]:
    """Milliseconds of each `next_plan` and `ran` together."""
    rng = random.Random(0)
    blocks = SwappableBlocks(BlockManager(130 * num_running, BLOCK_SIZE), BlockManager(130 * num_running, BLOCK_SIZE))
    policy = make_decode_policy(DecodePolicySettings(name, quantum_s=0.05))
    scheduler = PreemptiveDecodeScheduler(blocks, policy, max_num_seqs=256)
    for request_id in range(num_running):
        request = make_request(rng, request_id)
        sequence = Sequence(request, [0], request.prompt_len)
        num_blocks = blocks.device.blocks_for(request.prompt_len)
        sequence.block_ids = blocks.device.allocate(Owner("sequence", request_id), num_blocks)
        scheduler.add(sequence, 0.0, priority=rng.randrange(4), join_cost_s=rng.uniform(0, 0.2))
    times_ms, now = [], 0.0
    for decision in range(NUM_DECISIONS):
        # every other pass wants more than is free, so that some sequences leave in one and come back in the next
        num_wanted_blocks = blocks.device.num_free_blocks + 200 if decision % 2 else 0
        start = time.thread_time()
        plan = scheduler.next_plan(now, num_wanted_blocks)
        decided = time.thread_time()
        now += 0.02
        for sequence in plan.run:
            sequence.num_computed_tokens += 1
            sequence.append(0, frozenset())
        ended = time.thread_time()
        scheduler.ran(0.02, now)
        times_ms.append((decided - start + time.thread_time() - ended) * 1e3)
        for swap in plan.swap_out + plan.swap_in:
            scheduler.swap_ended(swap.request_id)
    return times_ms


def rows_for(label: str, small: list[float], large: list[float], sizes: str) -> list[dict[str, Any]]:
    median, growth = statistics.median(small), statistics.median(large) / statistics.median(small)
    return [
        {"name": label, "value": round(median, 4), "unit": "ms", "goal": f"<= {GOAL_MS}", "met": median <= GOAL_MS},
        {"name": f"{label}, worst", "value": round(max(small), 4), "unit": "ms", "goal": None, "met": None},
        {"name": f"{label}, {sizes}", "value": round(growth, 2), "unit": "times", "goal": "<= 15", "met": growth <= 15},
    ]


def main(out: Path = Path("docs/results/scheduler-cost.json")) -> None:
    rows: list[dict[str, Any]] = []
    for name in get_args(PolicyName):
        label = f"prefill {name}, 10,000 queued"
        rows += rows_for(label, prefill_ms(name, 10_000), prefill_ms(name, 100_000), "100,000 to 10,000")
    for name in get_args(DecodePolicyName):
        label = f"decode {name}, 1,000 running"
        rows += rows_for(label, decode_ms(name, 1000), decode_ms(name, 10_000), "10,000 to 1,000")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    results = {
        "device": f"one CPU core ({platform.machine()})",
        "versions": {"python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "command": "python -m tools.benchmarks.scheduler",
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['name']:58s} {row['value']:9.4f} {row['unit']:6s} {row['goal'] or '':8s} {row['met']}")


if __name__ == "__main__":
    typer.run(main)
