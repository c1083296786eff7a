"""A replica that computes the prompts of its sequences itself says what it says of prompts that are handed to it."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import pytest
import torch

from ensemble.cache.block_manager import BlockManager
from ensemble.config import Batching, Deployment
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, load_engine
from ensemble.protocol.router_replica import CancelRequests, Event, PrefixReport, PromptChunk, RunPrompts, StepDone
from ensemble.replicas.launched_steps import LaunchedSteps
from ensemble.replicas.lending import Lending
from ensemble.replicas.prompt_budget import whole_tiles
from ensemble.replicas.prompts import Prompts
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import DecodeLimits, Decoders
from ensemble.scheduling.estimator import StepEstimator, StepShape
from ensemble.scheduling.placement import AIM
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefiller import Limits, PromptBatch
from ensemble.transfer.leases import Leases
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Replica, released_in, swaps_in, tokens_of
from tests.serving.oracle import GreedyJudge
from tools.offline import generate

BLOCK_SIZE, BUDGET, NUM_REQUESTS, MAX_NUM_SEQS = 4, 24, 24, 6
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=[False, True], ids=["step by step", "launched ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU a step has run when it is launched; its tokens can be read a step later all the same, as on a GPU."""
    monkeypatch.setattr(Engine, "runs_ahead", request.param)
    return bool(request.param)


def deploy(model: Path, num_blocks: int, *, prefix_cache: bool = False, **decode: Any) -> Deployment:
    return Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": model, "dtype": "float64"},
            "prefill": {"max_num_batched_tokens": BUDGET, "prefix_cache": prefix_cache},
            "decode": {"devices": ["cpu"], "kv_cache_bytes": num_blocks * BLOCK_BYTES, "admission": "reserved"}
            | decode,
            "block_size": BLOCK_SIZE,
        }
    )


class Colocated:
    """One replica, and the schedulers that feed it."""

    def __init__(self, deployment: Deployment, address: str, device: torch.device = CPU) -> None:
        self.batches: list[Batch] = []
        self.replica = Replica(deployment, "decode", address, device)
        launch = self.replica.engine.launch

        def watch(batch: Batch) -> Any:
            self.batches.append(batch)
            return launch(batch)

        self.replica.engine.launch = watch  # type: ignore[method-assign]
        self.prefill = PrefillScheduler(
            block_size=deployment.block_size,
            max_num_batched_tokens=deployment.num_prompt_tokens_beside,
            max_num_seqs=8,
            max_batches_in_flight=3,
            max_queue_requests=100,
            max_queue_tokens=100_000,
        )
        self.admission = DecodeAdmission(
            Decoders(),
            block_size=deployment.block_size,
            max_bridge_wait_s=1.0,
        )
        self.credits = Credits(self.replica.engine.pool.num_blocks)
        self.prefill.replica_up(0, self.credits, Limits(deployment.num_prompt_tokens_beside, 3, stays=True))
        decode_limits = DecodeLimits(deployment.decode.num_places, self.replica.loop.num_host_blocks)
        self.admission.decoders.replica_up(0, self.credits, decode_limits)

    def dispatch(self, batch: PromptBatch) -> None:
        chunks = [
            PromptChunk(
                request_id=each.request_id, end=each.end, request=each.request if each.is_first else None, stays=True
            )
            for each in batch.chunks
        ]
        assert self.replica.handle(RunPrompts(batch_id=batch.batch_id, chunks=chunks)) == []

    def run(
        self,
        requests: list[Request],
        arrive_at: Callable[[int], int] = lambda index: 0,
        after_step: Callable[[int], list[int]] = lambda step: [],  # step |-> request ids to cancel
    ) -> list[Event]:
        events: list[Event] = []
        waiting = list(requests)
        deadline, step = time.monotonic() + 100, 0
        while waiting or self.prefill.num_waiting or self.credits.num_requests:
            while waiting and arrive_at(waiting[0].request_id) <= step:
                self.prefill.add(waiting.pop(0), float(step))
            while batch := self.prefill.next_batch(float(step), self.admission.try_start_at):
                self.dispatch(batch)
            new = self.replica.serve_once()
            for request_id in after_step(step):
                self.prefill.cancel(request_id)
                self.admission.withdraw(request_id)
                if request_id in self.credits:
                    new += self.replica.handle(CancelRequests(request_ids=[request_id]))
            for event in new:
                if isinstance(event, StepDone):
                    for batch_id in event.batch_ids:
                        self.prefill.batch_done(0, batch_id)
            self.prefill.released(0, released_in(new))
            self.admission.decoders.released(0, released_in(new))
            self.replica.check_integrity()
            self.prefill.check_integrity()
            self.admission.check_integrity()
            events += new
            step += 1
            assert time.monotonic() < deadline, "nothing moves any more"
        events += self.replica.run()
        self.replica.assert_empty()
        self.replica.close()
        return events


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/peer"


def make_requests() -> list[Request]:
    rng = random.Random(9)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 4, 7, 9, 30, 60]))],
            sampling=SamplingParams(
                max_tokens=rng.choice([1, 2, 8, 25]),
                temperature=float(index % 2),
                seed=index,
                ignore_eos=index % 3 > 0,
                repetition_penalty=1.1 if index % 4 == 0 else 1.0,
            ),
        )
        for index in range(NUM_REQUESTS)
    ]


def unconstrained(model: Path, requests: list[Request]) -> dict[int, list[int]]:
    deployment = deploy(model, num_blocks=1024)
    done = generate(load_engine(deployment, deployment.decode, CPU), requests)
    return {request_id: sequence.output_token_ids for request_id, sequence in done.items()}


@pytest.mark.parametrize("batching", get_args(Batching))
def test_prompts_join_running_sequences(model: Path, address: str, batching: str, runs_ahead: bool) -> None:
    requests = make_requests()
    colocated = Colocated(deploy(model, 200, batching=batching, max_num_seqs=MAX_NUM_SEQS), address)
    events = colocated.run(requests, arrive_at=lambda index: 2 * index)
    assert tokens_of(events) == unconstrained(model, requests)
    has_prompts = [batch for batch in colocated.batches if batch.prefills]
    assert all(sum(row.length for row in batch.prefills) <= BUDGET for batch in has_prompts)
    assert any(batch.decodes for batch in has_prompts) == (batching == "mixed")
    timed = [event.timed for event in events if isinstance(event, StepDone) and event.timed is not None]
    assert [each.shape.num_rows for each in timed] == [len(batch.decodes) for batch in colocated.batches]
    assert [(each.shape.num_prompt_tokens, each.shape.num_prompt_keys) for each in timed] == [
        (
            sum(row.length for row in batch.prefills),
            sum(p + 1 for row in batch.prefills for p in range(row.start, row.end)),
        )
        for batch in colocated.batches
    ]
    assert all(each.seconds > 0 for each in timed)


def test_prompts_of_several_small_batches_share_a_step(model: Path, address: str, runs_ahead: bool) -> None:
    requests = [request for request in make_requests() if request.prompt_len < 8][:3]
    colocated = Colocated(deploy(model, 200), address)
    for request in requests:  # each dispatched alone
        colocated.prefill.add(request, 0.0)
        batch = colocated.prefill.next_batch(0.0, colocated.admission.try_start_at)
        assert batch is not None
        colocated.dispatch(batch)
    colocated.run([])
    assert [row.sequence.request_id for row in colocated.batches[0].prefills] == [each.request_id for each in requests]


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["", "prefix cache"])
@pytest.mark.parametrize("policy", ["fcfs", "sj-mlfq"])
def test_with_a_pool_that_most_sequences_are_swapped_out_of(
    model: Path, address: str, policy: str, prefix_cache: bool, runs_ahead: bool
) -> None:
    requests = make_requests()
    if prefix_cache:  # prompts that begin alike
        requests = [
            msgspec.structs.replace(each, prompt_token_ids=[7] * 9 + each.prompt_token_ids) for each in requests
        ]
    deployment = deploy(
        model,
        24,
        prefix_cache=prefix_cache,
        policy=policy,
        quantum_s=0.001,
        starvation_s=0.05,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_resident_seqs=NUM_REQUESTS,
        host_kv_bytes=150 * BLOCK_BYTES,
    )
    events = Colocated(deployment, address).run(requests)
    assert tokens_of(events) == unconstrained(model, requests)
    if policy == "sj-mlfq":
        assert sum(report.num_preemptions for report in swaps_in(events)) > 0
    hits = sum(event.num_hit_tokens for event in events if isinstance(event, PrefixReport))
    assert (hits > 0) == prefix_cache


def test_a_step_takes_no_more_of_the_prompts_than_its_budget(model: Path, address: str, runs_ahead: bool) -> None:
    """Whatever batches were sent: a chunk is cut where the budget ends, and the smaller one holds beside sequences."""
    requests = [
        Request(
            request_id=index,
            prompt_token_ids=[index + 3] * prompt_len,
            sampling=SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
        )
        for index, prompt_len in enumerate([40, 3, 50])
    ]
    deployment = deploy(model, 200, local_prefill_tokens=10)
    colocated = Colocated(deployment, address)
    batches = [[(0, 30)], [(0, 40), (1, 3)], [(2, 50)]]
    for batch_id, chunks in enumerate(batches):
        first = {request_id: requests[request_id] for request_id, end in chunks if (request_id, end) != (0, 40)}
        commands = [
            PromptChunk(request_id=request_id, end=end, request=first.get(request_id), stays=True)
            for request_id, end in chunks
        ]
        colocated.replica.handle(RunPrompts(batch_id=batch_id, chunks=commands))
    events = colocated.replica.run()
    alone = [(batch.prefills, bool(batch.decodes)) for batch in colocated.batches if batch.prefills]
    spans = [[(row.sequence.request_id, row.start, row.end) for row in rows] for rows, _ in alone]
    assert spans[:2] == [[(0, 0, 24)], [(0, 24, 40), (1, 0, 3), (2, 0, 5)]]
    assert spans[2:] == [[(2, start, min(start + 10, 50))] for start in range(5, 50, 10)]
    assert [decodes for _, decodes in alone] == [False, False, True, True, True, True, True]
    ends = [batch_id for event in events if isinstance(event, StepDone) for batch_id in event.batch_ids]
    assert ends == [0, 1, 2]
    assert tokens_of(events) == unconstrained(model, requests)
    colocated.replica.assert_empty()
    colocated.replica.close()


@pytest.mark.parametrize(
    ("targets_s", "num_places", "length"),
    [
        ([None, None], 1, 24),
        ([None, 2.75e-3 / AIM], 1, 17),
        ([3.3e-3 / AIM, 2.75e-3 / AIM], 1, 17),
        ([None, 5.5e-3 / AIM], 2, 17),
    ],
)
def test_beside_sequences_prompts_take_what_the_smallest_itl_target_leaves(
    model: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    targets_s: list[float | None],
    num_places: int,
    length: int,
) -> None:
    """A step takes a millisecond, and a tenth for each token of a prompt. In a pipeline a token takes several steps."""
    monkeypatch.setattr(Engine, "is_pipeline", num_places > 1)
    monkeypatch.setattr(Engine, "max_num_unread", num_places - 1)
    estimator = StepEstimator()
    for start, length_of_chunk in [(0, 0), (0, 4), (0, 16), (0, 64), (100, 16), (100, 64)]:
        for lens in ([], [5], [5, 30]):
            shape = StepShape.of([(start, length_of_chunk)], lens)
            estimator.observe(shape, 1e-3 + 1e-4 * length_of_chunk)
    monkeypatch.setattr(StepEstimator, "observe", lambda *_: None)
    colocated = Colocated(deploy(model, 200), address)
    colocated.replica.loop.estimator = estimator
    sampling = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    running = [
        Request(request_id=index, prompt_token_ids=[5], sampling=sampling, itl_target_s=target_s, keeps_gaps=True)
        for index, target_s in enumerate(targets_s)
    ]
    late = Request(request_id=2, prompt_token_ids=[7] * 100, sampling=SamplingParams(max_tokens=1))
    events = colocated.run([*running, late], arrive_at=lambda index: 5 * (index == 2))
    assert tokens_of(events) == unconstrained(model, [*running, late])
    lengths = [sum(row.length for row in batch.prefills) for batch in colocated.batches if batch.decodes]
    lengths = [each for each in lengths if each]
    assert max(lengths) <= length and sum(lengths) == 100
    if targets_s == [None, None]:
        assert lengths == [24, 24, 24, 24, 4]
    else:  # the less waits, the less goes beside the sequences, but the least is 16
        assert min(lengths[:-1]) >= 16


def test_whole_tiles_leave_prompts_at_least_half_of_what_they_may_take() -> None:
    assert [whole_tiles(256, 2), whole_tiles(300, 5), whole_tiles(128, 0)] == [254, 251, 128]
    assert whole_tiles(66, 60) == 66  # 4 would fill a tile
    assert all(n >= 2 * whole_tiles(n, rows) - n >= 0 for n in range(1, 400) for rows in range(256))


def test_cancels_at_any_time_free_everything(model: Path, address: str, runs_ahead: bool) -> None:
    requests = make_requests()
    rng = random.Random(4)
    to_cancel = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS // 2)
    cancelled = set(to_cancel)
    events = Colocated(deploy(model, 60, max_num_seqs=MAX_NUM_SEQS), address).run(
        requests,
        arrive_at=lambda index: index // 2,
        after_step=lambda step: [to_cancel.pop()] if to_cancel and step % 2 else [],
    )
    expected, outputs = unconstrained(model, requests), tokens_of(events)
    for request in requests:
        said = outputs.get(request.request_id, [])
        whole = expected[request.request_id]
        assert said == (whole[: len(said)] if request.request_id in cancelled else whole)
    assert any(len(outputs.get(request_id, [])) < len(expected[request_id]) for request_id in cancelled)


def test_a_prompt_that_waits_for_blocks_holds_up_none_that_has_them() -> None:
    """Their blocks come free only when they have decoded: held up, both would wait for ever."""
    long, short, third = (
        Request(request_id=index, prompt_token_ids=[5] * length, sampling=SamplingParams())
        for index, length in enumerate([12, 4, 4])
    )
    blocks = BlockManager(10, BLOCK_SIZE)
    launched = LaunchedSteps(cast(Engine, None), None, time.monotonic)  # nothing is
    lending = Lending(blocks, Leases(), "here", 0)
    prompts = Prompts(blocks, launched, lending, lambda source_ids, target_ids: None)
    first = [PromptChunk(request_id=each.request_id, end=4, request=each) for each in (long, short)]
    rest = PromptChunk(request_id=0, end=12)
    new = PromptChunk(request_id=2, end=4, request=third)
    for batch_id, chunks in enumerate([first, [rest], [new]]):
        prompts.add(RunPrompts(batch_id=batch_id, chunks=chunks))

    def step(has_room: bool) -> tuple[list[tuple[int, int]], list[int]]:
        taken = prompts.next_step(8, lambda num_blocks: has_room or num_blocks == 3)
        for row in taken.rows:
            row.sequence.num_computed_tokens = row.end
        return [(row.sequence.request_id, row.length) for row in taken.rows], taken.batch_ids

    assert step(has_room=False) == ([(0, 8)], [])
    assert step(has_room=False) == ([(0, 4)], [1])
    assert prompts.num_wanted_blocks == 1
    assert step(has_room=False) == ([], [])
    assert step(has_room=True) == ([(1, 4), (2, 4)], [0, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("batching", get_args(Batching))
def test_on_a_gpu(tmp_path: Path, address: str, batching: str) -> None:
    """Graph steps and eager steps by turns, first tokens taken on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_tiny_llama(tmp_path / "model", hidden_size=256)
    block_bytes = 2 * 2 * 2 * 16 * 64 * 4
    deployment = Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": model, "dtype": "float32"},
            "prefill": {"max_num_batched_tokens": 64},
            "decode": {"devices": ["cuda:0"], "kv_cache_bytes": 300 * block_bytes, "batching": batching},
            "block_size": 16,
        }
    )
    rng = random.Random(3)
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    requests = [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 20, 90]))],
            sampling=sampling,
        )
        for index in range(NUM_REQUESTS)
    ]
    events = Colocated(deployment, address, torch.device("cuda:0")).run(requests, arrive_at=lambda index: 3 * index)
    judge, outputs = GreedyJudge(model), tokens_of(events)
    for request in requests:
        assert len(outputs[request.request_id]) == sampling.max_tokens
        assert judge.first_fault(request.prompt_token_ids, outputs[request.request_id]) is None
