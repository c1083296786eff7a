"""What one scheduling decision costs, by policy and size, on one core.

    python -m tools.benchmarks.scheduler

A prefill decision forms one batch of 2,048 tokens (prompts of 128 to 1,024 tokens) from a queue; a decode decision
plans an iteration of 256 sequences among all, with a few swaps, and accounts for it. A router's decision takes what a
replica has said, a step's tokens or room that is free again, and sends out what can start then; its fleet is of four
prefill and four decode replicas. Times are CPU time of the thread. The goal is 1 ms with 10,000 queued and 1,000
running; ten times the size may cost little more than ten times as much.
"""

import json
import platform
import random
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, get_args

import msgspec
import typer

from ensemble import request as requests
from ensemble.cache.block_manager import BlockManager, Owner, SwappableBlocks
from ensemble.config import DecodePolicyName, Deployment, PolicyName, Roles, StageName
from ensemble.errors import DistServeError
from ensemble.protocol.router_replica import (
    Command,
    Event,
    FromReplica,
    Join,
    Joined,
    KVHandoff,
    Released,
    ReplicaUp,
    RunPrompts,
    StepDone,
    ToReplica,
    ToStage,
    decode_command,
    encode,
)
from ensemble.replicas.preemptive_decode import PreemptiveDecodeScheduler
from ensemble.request import FinishReason, Request, SamplingParams, TokenLogProbs
from ensemble.router.lives import Timeline
from ensemble.router.router import Router
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy
from ensemble.scheduling.estimator import StepShape, TimedStep
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler

BLOCK_SIZE = 16
NUM_DECISIONS = 100
NUM_RUNNING = 1000
GOAL_MS = 1.0
# Of a 13B model on an H100, about: weights 10 ms, which hide 128 tokens; what the replicas' estimators are fitted to.
SHAPES = [
    StepShape.of([(0, chunk)] if chunk else [], [500] * rows) for chunk in (0, 64, 256, 2048) for rows in (0, 8, 64)
]
STEPS = [
    TimedStep(each, 1e-2 + 4e-5 * max(0, each.num_tokens - 128) + 3e-7 * each.num_row_keys)
    for each in SHAPES
    if each.num_tokens
]


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
        sequence = requests.Sequence(request, [0], request.prompt_len)
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


def router_ms(name: PolicyName, num_queued: int, roles: Roles = "fixed") -> dict[str, list[float]]:
    """What a router is told |-> milliseconds until it has sent what follows; and those of its metrics."""
    rng = random.Random(0)
    fleet = FullFleet(name, num_queued, rng, roles)
    times_ms: dict[str, list[float]] = {
        "a decode step": [],
        "a sequence's end": [],
        "a prompt's end": [],
        "metrics": [],
    }
    for _ in range(NUM_DECISIONS):
        times_ms["a decode step"].append(fleet.step(rng.choice(fleet.decode)))
        times_ms["a sequence's end"].append(fleet.end(rng.choice(fleet.decode)))
        times_ms["a prompt's end"] += fleet.answer()
        start = time.thread_time()
        fleet.router.gauges()
        times_ms["metrics"].append((time.thread_time() - start) * 1e3)
        fleet.refill()
    return times_ms


class Listener:
    """A client that does nothing with what it gets."""

    is_answered = False
    deadline = None

    def __init__(self, hints: Hints) -> None:
        self.timeline, self.hints = Timeline(), hints

    def take(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None) -> None:
        pass

    def fail(self, error: DistServeError) -> None:
        raise error

    def ended(self) -> None:
        pass


class FullFleet:
    """A router whose replicas decode as many sequences as they take, while other requests wait.

    `step`, `end` and `answer` tell it something and return the milliseconds that it took to send out what follows.
    """

    def __init__(self, policy: PolicyName, num_queued: int, rng: random.Random, roles: Roles) -> None:
        self._rng, self._num_queued, self._num_requests = rng, num_queued, 0
        self._sent: deque[tuple[int, Command]] = deque()
        self._prompt_lens: dict[int, int] = {}  # request_id |-> tokens
        self._running: dict[int, dict[int, int]] = {}  # replica |-> request_id |-> tokens of its output so far
        queue = {"roles": roles, "policy": policy, "max_wait_s": 1e9, "max_queue_requests": 2 * num_queued}
        deployment = Deployment.parse(
            {
                "model": {"path": "."},
                "prefill": {"devices": ["cpu"] * 4},
                "decode": {"devices": ["cpu"] * 4, "max_num_seqs": NUM_RUNNING // 4},
                "scheduler": queue | {"max_queue_tokens": 2048 * num_queued},
            }
        )
        self.router = Router(deployment, self._take, count(10**9).__next__, 0.0)
        self.decode = [index for index, (_, _, role) in enumerate(deployment.replicas()) if role == "decode"]
        for index, (home, device, _) in enumerate(deployment.replicas()):
            self._running[index] = {}
            up = ReplicaUp(
                replica=index,
                life=0,
                device=device,
                num_blocks=100_000,
                num_host_blocks=0,
                num_places=deployment.num_places(home),
                pid=0,
                peer_address=f"ipc://{index}",
                timed=STEPS,
            )
            self.router.receive(up, 0.0)
        while sum(map(len, self._running.values())) < NUM_RUNNING:
            self.refill()
            self._tell([])
            self.answer()

    def refill(self) -> None:
        """Until as many wait as should."""
        rng = self._rng
        while self.router.dispatch.prefill.num_waiting < self._num_queued:
            hints = Hints(rng.randrange(4), f"tenant-{rng.randrange(200)}", rng.choice([0.5, 2.0, 10.0]))
            request = make_request(rng, self._num_requests)
            self._prompt_lens[request.request_id] = request.prompt_len
            self._num_requests += 1
            self.router.arrive(request, Listener(hints), self._num_requests / 1e3)

    def step(self, replica: int) -> float:
        """A token of every sequence there."""
        running = self._running[replica]
        done = _step_done([*running], [*running.values()])
        self._running[replica] = {request_id: num_outputs + 1 for request_id, num_outputs in running.items()}
        return self._tell([(replica, done)])

    def end(self, replica: int) -> float:
        """A sequence's last token; its last response has been sent, and its blocks are free again."""
        request_id = next(iter(self._running[replica]))
        done = _step_done([request_id], [self._running[replica].pop(request_id)], {request_id: "length"})
        freed = Released(request_ids=[request_id], num_free_blocks=0)
        return self._tell([(replica, done), (replica, freed)], answered=request_id)

    def answer(self) -> list[float]:
        """Does what the replicas have been sent; of each batch of prompts, what its end took."""
        times_ms: list[float] = []
        for replica, command in list(self._sent):
            if isinstance(command, RunPrompts):
                done_chunks = [each for each in command.chunks if each.end == self._prompt_lens[each.request_id]]
                ids = [each.request_id for each in done_chunks]
                self._running[replica] |= {each.request_id: 1 for each in done_chunks if each.stays}
                handoffs = [
                    KVHandoff(request_id=each.request_id, source="", num_kv_tokens=0, block_ids=[])
                    for each in done_chunks
                    if not each.stays
                ]
                done = _step_done(ids, [0] * len(ids), handoffs=handoffs, batch_ids=[command.batch_id])
                times_ms.append(self._tell([(replica, done)]))
            elif isinstance(command, Join):
                ids = [arrival.request.request_id for arrival in command.arrivals]
                self._running[replica] |= dict.fromkeys(ids, 1)
                joined = Joined(request_ids=ids, transfer_s=[0.0] * len(ids), transfer_bytes=[0] * len(ids))
                freed = Released(request_ids=ids, num_free_blocks=0)
                self._tell([(replica, joined)] + [(other, freed) for other in self._running if other != replica])
            self._sent.popleft()
        return times_ms

    def _tell(self, events: Sequence[tuple[int, Event]], answered: int | None = None) -> float:
        now = self._num_requests / 1e3
        items = [FromReplica(replica=replica, life=0, event=msgspec.Raw(encode(event))) for replica, event in events]
        start = time.thread_time()
        for item in items:
            self.router.receive(item, now)
        if answered is not None:
            self.router.answered(answered)
        self.router.tick(now)
        return (time.thread_time() - start) * 1e3

    def _take(self, stage: StageName, item: ToStage) -> None:
        if isinstance(item, ToReplica):
            self._sent.append((item.replica, decode_command(item.command)))


def _step_done(
    ids: list[int],
    positions: list[int],
    finished: dict[int, FinishReason] | None = None,
    handoffs: Sequence[KVHandoff] = (),
    batch_ids: Sequence[int] = (),
) -> StepDone:
    return StepDone(
        request_ids=ids,
        positions=positions,
        token_ids=[0] * len(ids),
        finished=finished or {},
        log_probs={},
        handoffs=[*handoffs],
        batch_ids=[*batch_ids],
        num_free_blocks=0,
    )


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
    for policy in get_args(PolicyName):
        small, large = router_ms(policy, 10_000), router_ms(policy, 100_000)
        for event in small:
            label = f"router {policy}, 10,000 queued, 1,000 running, {event}"
            rows += rows_for(label, small[event], large[event], "100,000 to 10,000 queued")
    small, large = router_ms("fcfs", 10_000, "auto"), router_ms("fcfs", 100_000, "auto")
    for event in small:
        label = f"router fcfs, roles auto, 10,000 queued, 1,000 running, {event}"
        rows += rows_for(label, small[event], large[event], "100,000 to 10,000 queued")
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
