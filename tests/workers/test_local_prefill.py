"""A decode worker that computes prompts itself says what it says of prompts that are handed to it."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import zmq

from ensemble.cache.block_manager import BlockManager
from ensemble.config import Batching, Deployment
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, load_engine
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.prefill import Limits, PrefillScheduler
from ensemble.workers.decode_worker import DecodeWorker
from ensemble.workers.local_prefill import LocalPrefill
from ensemble.workers.messages import (
    CancelRequests,
    LocalPrefilled,
    PrefillBatch,
    PrefillChunk,
    SwapReport,
    WorkerEvent,
)
from ensemble.workers.peers import Peers
from tests.checkpoints import make_tiny_llama
from tests.serving.oracle import GreedyJudge
from tests.workers.pair import CPU, released_in, tokens_of
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


def deploy(model: Path, num_blocks: int, **decode: Any) -> Deployment:
    return Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": model, "dtype": "float64"},
            "prefill": {"max_num_batched_tokens": BUDGET},
            "decode": {"devices": ["cpu"], "kv_cache_bytes": num_blocks * BLOCK_BYTES, **decode},
            "block_size": BLOCK_SIZE,
        }
    )


class Colocated:
    """One decode worker, and the scheduler's two halves that feed it."""

    def __init__(self, deployment: Deployment, device: torch.device = CPU) -> None:
        self.context = zmq.Context()
        self.batches: list[Batch] = []
        engine = load_engine(deployment, deployment.decode, device)
        launch = engine.launch

        def watch(batch: Batch) -> Any:
            self.batches.append(batch)
            return launch(batch)

        engine.launch = watch  # type: ignore[method-assign]
        self.worker = DecodeWorker(
            engine, Peers(self.context, device), deployment.decode, deployment.local_prefill_tokens
        )
        block_size, num_host_blocks = deployment.block_size, self.worker.num_host_blocks
        self.prefill = PrefillScheduler(
            block_size=block_size,
            max_num_batched_tokens=deployment.local_prefill_tokens,
            max_num_seqs=8,
            max_batches_in_flight=3,
            max_queue_requests=100,
            max_queue_tokens=100_000,
        )
        self.admission = DecodeAdmission(
            block_size=block_size,
            max_num_bridge_seqs=1,
            expected_kv_tokens=lambda request: request.prompt_len + request.sampling.max_tokens // 3,
        )
        limits = Limits(deployment.local_prefill_tokens, 3, is_decoding=True)
        self.prefill.replica_up(0, engine.pool.num_blocks, limits, num_host_blocks)
        self.admission.replica_up(0, engine.pool.num_blocks, deployment.decode.num_places, num_host_blocks)

    def run(
        self,
        requests: list[Request],
        arrive_at: Callable[[int], int] = lambda index: 0,
        after_step: Callable[[int], list[int]] = lambda step: [],  # step |-> request ids to cancel
    ) -> list[WorkerEvent]:
        events: list[WorkerEvent] = []
        waiting = list(requests)
        deadline, step = time.monotonic() + 100, 0
        while waiting or self.prefill.num_waiting or self.admission.num_decode_seqs:
            while waiting and arrive_at(waiting[0].request_id) <= step:
                self.prefill.add(waiting.pop(0), float(step))
            while batch := self.prefill.next_batch(float(step), self.admission.try_start_at):
                assert self.worker.handle(batch) == []
            new = self.worker.step() if self.worker.has_work else []
            for request_id in after_step(step):
                at_decode = self.admission.cancel(request_id)
                self.prefill.cancel(request_id)
                if at_decode is not None:
                    new += self.worker.handle(CancelRequests(replica=0, request_ids=[request_id]))
            for event in new:
                if isinstance(event, LocalPrefilled):
                    for batch_id in event.batch_ids:
                        self.prefill.batch_done(0, batch_id)
            self.admission.released(0, released_in(new))
            self.prefill.released(0, released_in(new))
            self.worker.blocks.check_integrity()
            self.prefill.check_integrity()
            self.admission.check_integrity()
            events += new
            step += 1
            assert time.monotonic() < deadline, "nothing moves any more"
        while self.worker.has_work:
            events += self.worker.step()
        assert self.worker.engine.blocks.num_free_blocks == self.worker.engine.pool.num_blocks
        assert self.worker.blocks.host.num_free_blocks == self.worker.num_host_blocks
        self.context.term()
        return events


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
def test_prompts_join_running_sequences(model: Path, batching: str, runs_ahead: bool) -> None:
    requests = make_requests()
    colocated = Colocated(deploy(model, 200, batching=batching, max_num_seqs=MAX_NUM_SEQS))
    events = colocated.run(requests, arrive_at=lambda index: 2 * index)
    assert tokens_of(events) == unconstrained(model, requests)
    has_prompts = [batch for batch in colocated.batches if batch.prefills]
    assert all(sum(row.length for row in batch.prefills) <= BUDGET for batch in has_prompts)
    assert any(batch.decodes for batch in has_prompts) == (batching == "mixed")


def test_prompts_of_several_small_batches_share_a_step(model: Path, runs_ahead: bool) -> None:
    requests = [request for request in make_requests() if request.prompt_len < 8][:3]
    colocated = Colocated(deploy(model, 200))
    for request in requests:  # each dispatched alone
        colocated.prefill.add(request, 0.0)
        batch = colocated.prefill.next_batch(0.0, colocated.admission.try_start_at)
        assert batch is not None
        colocated.worker.handle(batch)
    colocated.run([])
    assert [row.sequence.request_id for row in colocated.batches[0].prefills] == [each.request_id for each in requests]


@pytest.mark.parametrize("policy", ["fcfs", "sj-mlfq"])
def test_with_a_pool_that_most_sequences_are_swapped_out_of(model: Path, policy: str, runs_ahead: bool) -> None:
    requests = make_requests()
    deployment = deploy(
        model,
        20,
        policy=policy,
        quantum_s=0.001,
        starvation_s=0.05,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_resident_seqs=NUM_REQUESTS,
        host_kv_bytes=150 * BLOCK_BYTES,
    )
    events = Colocated(deployment).run(requests)
    assert tokens_of(events) == unconstrained(model, requests)
    if policy == "sj-mlfq":
        assert sum(event.num_preemptions for event in events if isinstance(event, SwapReport)) > 0


def test_cancels_at_any_time_free_everything(model: Path, runs_ahead: bool) -> None:
    requests = make_requests()
    rng = random.Random(4)
    to_cancel = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS // 2)
    cancelled = set(to_cancel)
    events = Colocated(deploy(model, 60, max_num_seqs=MAX_NUM_SEQS)).run(
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
    prompts = LocalPrefill(BlockManager(10, BLOCK_SIZE), max_num_tokens=8)
    first = [PrefillChunk(request_id=each.request_id, start=0, length=4, request=each) for each in (long, short)]
    rest = PrefillChunk(request_id=0, start=4, length=8)
    new = PrefillChunk(request_id=2, start=0, length=4, request=third)
    for batch_id, chunks in enumerate([first, [rest], [new]]):
        prompts.add(PrefillBatch(replica=0, batch_id=batch_id, chunks=chunks))

    def step(has_room: bool) -> tuple[list[tuple[int, int]], list[int]]:
        taken = prompts.next_step(lambda num_blocks: has_room or num_blocks == 3)
        for row in taken.rows:
            row.sequence.num_computed_tokens = row.end
        return [(row.sequence.request_id, row.length) for row in taken.rows], taken.batch_ids

    assert step(has_room=False) == ([(0, 4)], [])
    assert step(has_room=False) == ([(0, 8)], [1])
    assert prompts.num_wanted_blocks == 1
    assert step(has_room=False) == ([], [])
    assert step(has_room=True) == ([(1, 4), (2, 4)], [0, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("batching", get_args(Batching))
def test_on_a_gpu(tmp_path: Path, batching: str) -> None:
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
    events = Colocated(deployment, torch.device("cuda:0")).run(requests, arrive_at=lambda index: 3 * index)
    judge, outputs = GreedyJudge(model), tokens_of(events)
    for request in requests:
        assert len(outputs[request.request_id]) == sampling.max_tokens
        assert judge.first_fault(request.prompt_token_ids, outputs[request.request_id]) is None
