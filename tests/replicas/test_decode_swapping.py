"""Decode with far more sequences than the pool holds: what they say is what they say with room for all."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch

from ensemble.cache import block_copier, swapper
from ensemble.config import DecodePolicyName, Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.errors import ConfigError
from ensemble.protocol.router_replica import CancelRequests, Event, Preempted
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import DecodeLimits, Decoders
from kernels.block_copy import copy_blocks
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Pair, handoffs_of, join, released_in, swaps_in, tokens_of, whole_prompts
from tests.serving.oracle import GreedyJudge
from tools.offline import generate

BLOCK_SIZE = 4
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64
NUM_BLOCKS, NUM_HOST_BLOCKS, NUM_REQUESTS, MAX_NUM_SEQS = 18, 120, 24, 6
POLICIES = get_args(DecodePolicyName)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def deploy(model: Path, num_blocks: int = NUM_BLOCKS, **decode: Any) -> Deployment:
    return Deployment.parse(
        {
            "model": {"path": model, "dtype": "float64"},
            "prefill": {"devices": ["cpu"], "kv_cache_bytes": 256 * BLOCK_BYTES},
            "decode": {"devices": ["cpu"], "kv_cache_bytes": num_blocks * BLOCK_BYTES, "admission": "reserved"}
            | decode,
            "block_size": BLOCK_SIZE,
        }
    )


def swapping(model: Path, policy: str = "mlfq", **changes: Any) -> Deployment:
    decode: dict[str, Any] = {
        "policy": policy,
        "quantum_s": 0.001,
        "starvation_s": 0.05,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_resident_seqs": NUM_REQUESTS,
        "host_kv_bytes": NUM_HOST_BLOCKS * BLOCK_BYTES,
    }
    return deploy(model, **(decode | changes))


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[[Deployment], Pair]]:
    pairs: list[Pair] = []

    def make(deployment: Deployment) -> Pair:
        pairs.append(Pair(deployment, tmp_path))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture(params=[False, True], ids=["step by step", "launched ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU a step has run when it is launched; its tokens can be read a step later all the same, as on a GPU."""
    monkeypatch.setattr(Engine, "runs_ahead", request.param)
    return bool(request.param)


def make_requests(temperature: float) -> list[Request]:
    rng = random.Random(5)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 4, 7, 9]))],
            priority=rng.randrange(3),
            sampling=SamplingParams(
                max_tokens=rng.randint(8, 40),
                temperature=temperature,
                seed=index,
                ignore_eos=index % 3 > 0,
                repetition_penalty=1.1 if index % 4 == 0 else 1.0,
            ),
        )
        for index in range(NUM_REQUESTS)
    ]


def unconstrained(model: Path, requests: list[Request]) -> dict[int, list[int]]:
    deployment = deploy(model, num_blocks=512)
    done = generate(load_engine(deployment, deployment.decode, CPU), requests)
    return {request_id: sequence.output_token_ids for request_id, sequence in done.items()}


def run(
    pair: Pair,
    requests: list[Request],
    after_step: Callable[[int], list[Event]] = lambda step: [],
    block_size: int = BLOCK_SIZE,
) -> list[Event]:
    """All requests through both replicas, admitted to decode as if a third of each output were to come."""
    admission = DecodeAdmission(
        Decoders(),
        block_size=block_size,
        max_bridge_wait_s=1.0,
    )
    credits, by_id = Credits(NUM_BLOCKS), {request.request_id: request for request in requests}
    admission.decoders.replica_up(0, credits, DecodeLimits(NUM_REQUESTS, pair.decode.loop.num_host_blocks))
    pair.prefill.handle(whole_prompts(requests))
    prefill_events = pair.prefill.run()
    for request_id in handoffs_of(prefill_events):
        admission.promise(by_id[request_id])
        admission.arrive(request_id, source=1)
    events = list(prefill_events)
    deadline, step = time.monotonic() + 60, 0
    while admission.num_bridge_seqs or credits.num_requests:
        while (submission := admission.next_submission()) is not None:
            arriving = [by_id[request_id] for request_id in submission.request_ids]
            events += pair.decode.handle(join(prefill_events, arriving))
        is_step = pair.decode.loop.has_work  # else it waits for the source's pool to be mapped
        new = pair.decode.serve_once()
        new += after_step(step) if is_step else []
        admission.decoders.released(0, released_in(new))
        pair.decode.check_integrity()
        events += new
        step += is_step
        assert time.monotonic() < deadline, "nothing moves any more"
    while pair.prefill.loop.leases:
        pair.prefill.acknowledged()
    assert not pair.decode.loop.has_work
    return events


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
@pytest.mark.parametrize("num_host_blocks", [0, 8])
def test_a_storm_of_optimists_says_what_is_said_with_room_for_all(
    model: Path, make_pair: Callable[[Deployment], Pair], policy: str, num_host_blocks: int, runs_ahead: bool
) -> None:
    """As many as fit by their prompts are admitted: they outgrow the pool, and are swapped or computed again."""
    deployment = swapping(model, policy, admission="optimistic", host_kv_bytes=num_host_blocks * BLOCK_BYTES)
    pair, requests = make_pair(deployment), make_requests(1.0)
    origin = {request.request_id: request for request in requests}  # attempt id |-> request
    said: dict[int, list[int]] = {request.request_id: [] for request in requests}
    events = pair.prefill.handle(whole_prompts(requests)) + pair.prefill.run()
    attempts, num_given_up, num_swaps = requests, 0, 0
    deadline = time.monotonic() + 60
    while attempts:
        new = pair.decode.handle(join(events, attempts))
        attempts = []
        while pair.decode.loop.has_work or pair.decode.peers.attaching or pair.decode.loop._arrivals.request_ids:
            new += pair.decode.serve_once()
            pair.decode.check_integrity()
            pair.prefill.loop.end_leases(pair.prefill.server.acknowledged())
            assert time.monotonic() < deadline, "nothing moves any more"
        for attempt_id, token_ids in tokens_of(events).items():
            said[origin[attempt_id].request_id] += token_ids
        for attempt_id, token_ids in tokens_of(new).items():
            said[origin[attempt_id].request_id] += token_ids
        given_up = [i for event in new if isinstance(event, Preempted) for i in event.request_ids]
        for attempt_id in given_up:
            request = origin[attempt_id]
            again = msgspec.structs.replace(
                request, request_id=len(origin), resumed_token_ids=list(said[request.request_id])
            )
            origin[again.request_id] = request
            attempts.append(again)
        num_given_up += len(given_up)
        num_swaps += sum(report.num_preemptions for report in swaps_in(new))
        events = pair.prefill.handle(whole_prompts(attempts)) + pair.prefill.run() if attempts else []
    assert said == unconstrained(model, make_requests(1.0))
    assert num_given_up > 0 and (num_swaps > 0) == (num_host_blocks > 0)
    pair.prefill.loop.end_leases(pair.prefill.server.acknowledged())
    pair.assert_empty()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_swapped_sequences_say_what_they_say_with_room_for_all(
    model: Path, make_pair: Callable[[Deployment], Pair], policy: str, temperature: float, runs_ahead: bool
) -> None:
    requests = make_requests(temperature)
    pair = make_pair(swapping(model, policy))
    events = run(pair, requests)
    assert tokens_of(events) == unconstrained(model, requests)
    reports = swaps_in(events)
    assert sum(report.num_preemptions for report in reports) > NUM_REQUESTS // 2
    assert sum(report.bytes_out for report in reports) == sum(report.bytes_in for report in reports) > 0
    assert max(report.num_swapped_seqs for report in reports) > 1
    assert reports[-1].num_swapped_seqs == 0
    pair.assert_empty()


def test_slow_copies_are_waited_for(
    model: Path,
    make_pair: Callable[[Deployment], Pair],
    monkeypatch: pytest.MonkeyPatch,
    runs_ahead: bool,
) -> None:
    """Many steps pass while a copy is under way: its blocks may neither be written nor read meanwhile."""

    def copy_slowly(
        source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> None:
        for index in range(len(source_ids)):
            time.sleep(0.002)
            copy_blocks(source, target, source_ids[index : index + 1], target_ids[index : index + 1])

    monkeypatch.setattr(block_copier, "copy_blocks", copy_slowly)
    requests = make_requests(1.0)
    pair = make_pair(swapping(model))
    events = run(pair, requests)
    assert tokens_of(events) == unconstrained(model, requests)
    assert sum(report.num_preemptions for report in swaps_in(events)) > 0
    pair.assert_empty()


def test_cancels_in_the_midst_of_swaps_free_both_pools(
    model: Path, make_pair: Callable[[Deployment], Pair], runs_ahead: bool
) -> None:
    requests = make_requests(1.0)
    pair = make_pair(swapping(model))
    rng = random.Random(2)
    cancelled: set[int] = set()

    def cancel_some(step: int) -> list[Event]:
        here = sorted(pair.decode.loop._running.request_ids)
        if step % 5 != 4 or not here or len(cancelled) == NUM_REQUESTS // 2:
            return []
        request_id = rng.choice(here)
        cancelled.add(request_id)
        return pair.decode.handle(CancelRequests(request_ids=[request_id]))

    events = run(pair, requests, cancel_some)
    expected = unconstrained(model, requests)
    for request_id, token_ids in tokens_of(events).items():
        if request_id in cancelled:
            assert token_ids == expected[request_id][: len(token_ids)]
        else:
            assert token_ids == expected[request_id]
    assert any(len(tokens_of(events)[request_id]) < len(expected[request_id]) for request_id in cancelled)
    assert swaps_in(events)[-1].num_swapped_seqs == 0
    pair.assert_empty()


def test_without_a_host_pool_nothing_is_swapped_and_everything_admitted_ends(
    model: Path, make_pair: Callable[[Deployment], Pair], runs_ahead: bool
) -> None:
    requests = make_requests(1.0)
    pair = make_pair(deploy(model, policy="mlfq", quantum_s=0.001, max_num_seqs=MAX_NUM_SEQS))
    events = run(pair, requests)
    assert tokens_of(events) == unconstrained(model, requests)
    assert swaps_in(events) == []
    pair.assert_empty()


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["copy engine", "kernel"])
@pytest.mark.parametrize("slow_cycles", [0, 5_000_000])
def test_on_a_gpu_with_copies_that_take_longer_than_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: int, slow_cycles: int
) -> None:
    """Blocks that are reused or read before a copy has ended would show in the tokens."""
    monkeypatch.setattr(swapper, "COPY_ENGINE_RUN_BYTES", threshold)
    monkeypatch.setattr(block_copier, "NUM_CHEAP_RUNS", 0)
    for name in ("copy_runs", "copy_blocks"):
        copy = getattr(block_copier, name)

        def copy_slowly(*arguments: Any, copy: Callable[..., None] = copy, **settings: Any) -> None:
            torch.cuda._sleep(slow_cycles)
            copy(*arguments, **settings)

        monkeypatch.setattr(block_copier, name, copy_slowly)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_tiny_llama(tmp_path / "model", hidden_size=256)
    block_bytes = 2 * 2 * 2 * 16 * 64 * 4
    prefill = {"devices": ["cuda:0"], "kv_cache_bytes": 256 * block_bytes}
    decode = {
        "devices": ["cuda:0"],
        "kv_cache_bytes": NUM_BLOCKS * block_bytes,
        "host_kv_bytes": NUM_HOST_BLOCKS * block_bytes,
        "policy": "mlfq",
        "quantum_s": 0.002,
        "starvation_s": 0.1,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_resident_seqs": NUM_REQUESTS,
    }
    deployment = Deployment.parse(
        {"model": {"path": model, "dtype": "float32"}, "prefill": prefill, "decode": decode, "block_size": 16}
    )
    rng = random.Random(3)
    sampling = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=index, prompt_token_ids=[rng.randrange(3, 380) for _ in range(30)], sampling=sampling)
        for index in range(NUM_REQUESTS)
    ]
    pair = Pair(deployment, tmp_path, torch.device("cuda:0"))
    try:
        events = run(pair, requests, block_size=16)
        assert sum(report.num_preemptions for report in swaps_in(events)) > NUM_REQUESTS // 2
        pair.assert_empty()
    finally:
        pair.close()
    judge, outputs = GreedyJudge(model), tokens_of(events)
    for request in requests:
        assert len(outputs[request.request_id]) == sampling.max_tokens
        assert judge.first_fault(request.prompt_token_ids, outputs[request.request_id]) is None


def test_a_host_pool_below_one_block_is_refused(model: Path, make_pair: Callable[[Deployment], Pair]) -> None:
    with pytest.raises(ConfigError, match="host_kv_bytes = 100"):
        make_pair(deploy(model, host_kv_bytes=100))
