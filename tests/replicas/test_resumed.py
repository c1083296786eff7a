"""A sequence that is computed again after its replica was lost goes on with exactly the tokens it would have had."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ensemble.config import Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.protocol.router_replica import Event, PrefixReport, PromptChunk, RunPrompts, StepDone
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Pair, join, tokens_of, whole_prompts
from tools.offline import generate

BLOCK_SIZE = 4
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def deploy(model: Path, prefix_cache: bool) -> Deployment:
    stage = {"devices": ["cpu"], "kv_cache_bytes": 400 * BLOCK_BYTES}
    return Deployment.parse(
        {
            "model": {"path": model, "dtype": "float64"},
            "prefill": {**stage, "prefix_cache": prefix_cache, "max_num_batched_tokens": 16},
            "decode": stage,
            "block_size": BLOCK_SIZE,
        }
    )


def make_requests() -> list[Request]:
    """Ways to choose tokens that depend on what came before: its positions, its counts, its end."""
    rng = random.Random(11)
    ways: list[dict[str, float | int | bool]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 17},
        {"temperature": 0.8, "seed": 3, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 5, "presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"temperature": 1.0, "seed": 6, "min_tokens": 12},
    ]
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 4, 9, 21]))],
            sampling=msgspec.convert({"max_tokens": 16, "ignore_eos": "min_tokens" not in way, **way}, SamplingParams),
        )
        for index, way in enumerate(ways)
    ]


@pytest.fixture(scope="module")
def uninterrupted(model: Path) -> dict[int, list[int]]:
    deployment = deploy(model, prefix_cache=False)
    done = generate(load_engine(deployment, deployment.decode, CPU), make_requests())
    return {request_id: sequence.output_token_ids for request_id, sequence in done.items()}


@pytest.fixture(params=[False, True], ids=["no prefix cache", "prefix cache"])
def pair(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(deploy(model, request.param), tmp_path)
    yield pair
    pair.close()


@pytest.fixture(params=[False, True], ids=["step by step", "launched ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(Engine, "runs_ahead", request.param)
    return bool(request.param)


def resumed(uninterrupted: dict[int, list[int]]) -> list[Request]:
    """Attempts after 1, 2, ... tokens, up to one that has a single token to go."""
    again = []
    for request in make_requests():
        tokens = uninterrupted[request.request_id]
        for num_tokens in {1, 8, len(tokens) - 1} & set(range(1, len(tokens))):
            attempt_id = 100 * (request.request_id + 1) + num_tokens
            again.append(msgspec.structs.replace(request, request_id=attempt_id, resumed_token_ids=tokens[:num_tokens]))
    return again


def check_tokens(events: list[Event], requests: list[Request], uninterrupted: dict[int, list[int]]) -> None:
    tokens = tokens_of(events)
    for request in requests:
        whole = uninterrupted[request.request_id // 100 - 1]
        assert request.resumed_token_ids + tokens[request.request_id] == whole
    positions: dict[int, int] = {}
    for event in events:
        if isinstance(event, StepDone):
            for request_id, position in zip(event.request_ids, event.positions, strict=True):
                positions.setdefault(request_id, position)
    assert positions == {request.request_id: len(request.resumed_token_ids) for request in requests}


def in_chunks(requests: list[Request], batch_id: int) -> RunPrompts:
    """Two chunks each, the first of which ends somewhere in the prompt or in the tokens after it."""
    rng = random.Random(2)
    chunks = []
    for request in requests:
        middle = rng.randrange(1, request.prefill_len)
        chunks.append(PromptChunk(request_id=request.request_id, end=middle, request=request, stays=True))
        chunks.append(PromptChunk(request_id=request.request_id, end=request.prefill_len, stays=True))
    return RunPrompts(batch_id=batch_id, chunks=chunks)


def test_where_it_is_handed_off(pair: Pair, uninterrupted: dict[int, list[int]], runs_ahead: bool) -> None:
    requests = resumed(uninterrupted)
    pair.prefill.handle(whole_prompts(requests))
    events = pair.prefill.run()
    pair.decode.handle(join(events, requests))
    events += pair.decode.run()
    check_tokens(events, requests, uninterrupted)
    while pair.prefill.loop.leases:
        pair.prefill.acknowledged()
    pair.assert_empty()


def test_where_it_stays(pair: Pair, uninterrupted: dict[int, list[int]], runs_ahead: bool) -> None:
    requests = resumed(uninterrupted)
    pair.decode.handle(in_chunks(requests, batch_id=0))
    events = pair.decode.run()
    check_tokens(events, requests, uninterrupted)
    pair.assert_empty()


def test_where_its_prompt_is_still_cached(model: Path, tmp_path: Path, uninterrupted: dict[int, list[int]]) -> None:
    """What comes again is found as far as it was cached: full blocks of the prompt, and of the tokens after it."""
    pair = Pair(deploy(model, prefix_cache=True), tmp_path)
    try:
        requests = resumed(uninterrupted)
        twice = [msgspec.structs.replace(request, request_id=request.request_id + 50) for request in requests]
        pair.decode.handle(whole_prompts(requests, stays=True))
        pair.decode.run()
        pair.decode.handle(whole_prompts(twice, stays=True, batch_id=1))
        events = pair.decode.run()
        check_tokens(events, twice, uninterrupted)
        hits = sum(event.num_hit_tokens for event in events if isinstance(event, PrefixReport))
        full_blocks = [(request.prefill_len) // BLOCK_SIZE * BLOCK_SIZE for request in twice]
        # of a prompt that is cached whole, the last token is computed
        assert hits == sum(
            full - (full == request.prefill_len) for full, request in zip(full_blocks, twice, strict=True)
        )
        pair.assert_empty()
    finally:
        pair.close()
