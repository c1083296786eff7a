"""Two replicas whose roles change under load: each computes prompts that stay and prompts that it hands off, pulls what
the other one has prefilled, and swaps, all in the same steps.
"""

import random
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from ensemble.config import Deployment, Role
from ensemble.engine.engine import Engine, load_engine
from ensemble.protocol.router_replica import (
    Arrival,
    CancelRequests,
    Event,
    Join,
    Joined,
    KVHandoff,
    Preempted,
    PrefixReport,
    PromptChunk,
    Released,
    RunPrompts,
    StepDone,
)
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import DecodeLimits, Decoders
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefiller import Limits
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Replica, swaps_in, tokens_of
from tools.offline import generate

BLOCK_SIZE, NUM_BLOCKS, NUM_HOST_BLOCKS, NUM_REQUESTS = 4, 24, 30, 48
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64
ROLES: list[tuple[Role, Role]] = [  # by turns
    ("mixed", "mixed"),
    ("prefill", "decode"),
    ("decode", "prefill"),
    ("mixed", "prefill"),
    ("prefill", "decode"),
    ("decode", "mixed"),
    ("decode", "prefill"),
    ("prefill", "mixed"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def deploy(model: Path, *, prefix_cache: bool, num_blocks: int = NUM_BLOCKS) -> Deployment:
    return Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": model, "dtype": "float64"},
            "prefill": {"max_num_batched_tokens": 24, "prefix_cache": prefix_cache},
            "decode": {
                "devices": ["cpu", "cpu"],
                "kv_cache_bytes": num_blocks * BLOCK_BYTES,
                "host_kv_bytes": NUM_HOST_BLOCKS * BLOCK_BYTES,
                "policy": "mlfq",
                "quantum_s": 0.001,
                "starvation_s": 0.05,
                "max_num_seqs": 4,
                "max_num_resident_seqs": 20,
                "local_prefill_tokens": 10,
            },
            "block_size": BLOCK_SIZE,
        }
    )


def make_requests() -> list[Request]:
    rng = random.Random(13)
    beginnings = [[rng.randrange(3, 380) for _ in range(length)] for length in (4, 9, 16)]

    def make(index: int) -> Request:
        ending = [rng.randrange(3, 380) for _ in range(rng.choice([0, 2, 7, 12]))]
        max_tokens, ignore_eos = rng.choice([1, 20, 40, 40]), index % 3 > 0
        sampling = SamplingParams(max_tokens=max_tokens, temperature=index % 2, seed=index, ignore_eos=ignore_eos)
        return Request(request_id=index, prompt_token_ids=rng.choice(beginnings) + ending, sampling=sampling)

    return [make(index) for index in range(NUM_REQUESTS)]


class Fleet:
    """Two replicas and the schedulers, joined as the router joins them."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        self.replicas = [Replica(deployment, "decode", f"ipc://{run_dir}/{index}") for index in range(2)]
        self.roles: list[Role] = ["mixed", "mixed"]
        self.prefill = PrefillScheduler(
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=24,
            max_num_seqs=8,
            max_batches_in_flight=2,
            max_queue_requests=1000,
            max_queue_tokens=100_000,
        )
        self.admission = DecodeAdmission(
            Decoders(),
            block_size=BLOCK_SIZE,
            max_bridge_wait_s=1.0,
            wait_s=lambda num_blocks: self.admission.num_promised_seqs / 2.5,
            expected_kv_tokens=lambda request: request.prefill_len + request.sampling.max_tokens // 6,
        )
        self.credits = [Credits(NUM_BLOCKS) for _ in self.replicas]
        for index, credits in enumerate(self.credits):
            self.prefill.replica_up(index, credits, self.limits(index))
            self.admission.decoders.replica_up(index, credits, DecodeLimits(20, NUM_HOST_BLOCKS))
        self.requests: dict[int, Request] = {}  # that live
        self.stays: set[int] = set()
        self.handoffs: dict[int, KVHandoff] = {}
        self.events: list[Event] = []
        self.states: set[str] = set()  # in which requests were seen

    def limits(self, index: int) -> Limits | None:
        limits = {"prefill": self.prefill.limits, "decode": None, "mixed": Limits(10, 3, stays=True)}
        return limits[self.roles[index]]

    def set_role(self, index: int, role: Role) -> None:
        self.roles[index] = role
        self.admission.decoders.set_open(index, role != "prefill")
        self.prefill.set_limits(index, self.limits(index))

    def may_start(self, index: int, request: Request) -> bool:
        if self.roles[index] == "prefill":
            if may_start := self.admission.may_start(request):
                self.admission.promise(request)
            return may_start
        if not self.admission.try_start_at(index, request):
            return False
        self.stays.add(request.request_id)
        return True

    def dispatch(self) -> None:
        while submission := self.admission.next_submission():
            requests = [self.requests[request_id] for request_id in submission.request_ids]
            arrivals = [
                Arrival(
                    request=each,
                    output_token_ids=self.output_of(each),
                    handoff=self.handoffs.pop(each.request_id),
                )
                for each in requests
            ]
            self.take(submission.replica, self.replicas[submission.replica].handle(Join(arrivals=arrivals)))
        while batch := self.prefill.next_batch(0.0, self.may_start):
            chunks = [
                PromptChunk(
                    request_id=each.request_id,
                    end=each.end,
                    request=each.request if each.is_first else None,
                    stays=each.request_id in self.stays,
                )
                for each in batch.chunks
            ]
            self.replicas[batch.replica].handle(RunPrompts(batch_id=batch.batch_id, chunks=chunks))

    def cancel(self, request_id: int) -> None:
        del self.requests[request_id]
        self.admission.withdraw(request_id)
        self.prefill.cancel(request_id)
        for index, credits in enumerate(self.credits):
            if request_id in credits:
                self.take(index, self.replicas[index].handle(CancelRequests(request_ids=[request_id])))

    def take(self, index: int, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, StepDone):
                for batch_id in event.batch_ids:
                    self.prefill.batch_done(index, batch_id)
                for request_id in event.finished:
                    self.admission.withdraw(request_id)
                    self.requests.pop(request_id, None)
                for handoff in event.handoffs:
                    if handoff.request_id in self.requests:
                        self.handoffs[handoff.request_id] = handoff
                        self.admission.arrive(handoff.request_id, index)
            if isinstance(event, Released | Preempted):
                self.prefill.released(index, event.request_ids)
                self.admission.decoders.released(index, event.request_ids)
            if isinstance(event, Preempted):
                self.states.add("is given up")
                for request_id in event.request_ids:
                    if request_id in self.requests:
                        self.again(request_id)

    def again(self, request_id: int) -> None:
        """As the router does: under another id, from the tokens that were told."""
        request = self.requests.pop(request_id)
        resumed_token_ids = self.output_of(request)
        again = replace(request, request_id=request_id + NUM_REQUESTS, resumed_token_ids=resumed_token_ids)
        self.requests[again.request_id] = again
        self.prefill.add(again, 0.0)

    def output_of(self, request: Request) -> list[int]:
        """All that was told, by earlier attempts too."""
        return request.resumed_token_ids + tokens_of(self.events).get(request.request_id, [])

    def states_now(self) -> set[str]:
        return set[str]().union(*map(states_of, self.replicas))

    def step(self) -> None:
        self.dispatch()
        self.states |= self.states_now()
        for index, replica in enumerate(self.replicas):
            self.take(index, replica.serve_once())
            replica.check_integrity()
            self.credits[index].check_integrity()
        self.states |= states_of(self.replicas[0])
        self.prefill.check_integrity()
        self.admission.check_integrity()


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefix cache", "prefix cache"])
@pytest.mark.parametrize("runs_ahead", [False, True], ids=["step by step", "launched ahead"])
def test_everything_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool, prefix_cache: bool
) -> None:
    monkeypatch.setattr(Engine, "runs_ahead", runs_ahead)
    fleet, rng = Fleet(deploy(model, prefix_cache=prefix_cache), tmp_path), random.Random(1)
    requests = make_requests()
    waiting, cancelled = list(requests), set()
    deadline, step = time.monotonic() + 100, 0
    while waiting or fleet.requests or any(credits.num_requests for credits in fleet.credits):
        if waiting and step % 2 == 0:
            request = waiting.pop(0)
            fleet.requests[request.request_id] = request
            fleet.prefill.add(request, 0.0)
        if step % 7 == 6:
            for index, role in enumerate(ROLES[step // 7 % len(ROLES)]):
                fleet.set_role(index, role)
        if step % 11 == 10 and fleet.requests:
            request_id = rng.choice(sorted(fleet.requests))
            cancelled.add(request_id % NUM_REQUESTS)
            fleet.cancel(request_id)
        fleet.step()
        step += 1
        assert time.monotonic() < deadline, "nothing moves any more"

    roomy = deploy(model, prefix_cache=False, num_blocks=512)
    done = generate(load_engine(roomy, roomy.decode, CPU), requests)
    expected = {request_id: sequence.output_token_ids for request_id, sequence in done.items()}
    tokens: dict[int, list[int]] = {}
    for attempt_id, some in sorted(tokens_of(fleet.events).items()):
        tokens.setdefault(attempt_id % NUM_REQUESTS, []).extend(some)
    for request_id, whole in expected.items():
        said = tokens.get(request_id, [])
        assert said == (whole[: len(said)] if request_id in cancelled else whole)
    for replica in fleet.replicas:
        replica.run()
        replica.assert_empty()
        replica.close()
    assert fleet.states == {"stays", "hands off", "leases", "arrives", "decodes", "is swapped", "is given up"}
    joined = [event for event in fleet.events if isinstance(event, Joined)]
    assert sum(sum(event.transfer_bytes) for event in joined) > 0
    assert sum(report.num_preemptions for report in swaps_in(fleet.events)) > 0
    hits = sum(event.num_hit_tokens for event in fleet.events if isinstance(event, PrefixReport))
    assert (hits > 0) == prefix_cache


def states_of(replica: Replica) -> set[str]:
    """What the requests at a replica are doing."""
    loop = replica.loop
    stays = {loop._prompts.stays(request_id) for request_id in loop._prompts.request_ids}
    states = {
        "stays": True in stays,
        "hands off": False in stays,
        "leases": bool(loop.leases),
        "arrives": bool(loop._arrivals.request_ids),
        "decodes": bool(loop._running.request_ids),
        "is swapped": loop._running.num_swapped > 0,
    }
    return {name for name, is_so in states.items() if is_so}
