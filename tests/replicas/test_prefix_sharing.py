"""Prompts that share cached prefixes say what they say alone, whatever is cut, cancelled or evicted meanwhile."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.protocol.router_replica import (
    CancelRequests,
    DetachPeer,
    Event,
    Joined,
    LeasePrefix,
    PrefixPulled,
    PrefixReport,
    PromptChunk,
    RunPrompts,
    StepDone,
)
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Pair, fetch_prefix, fetched_in, join, released_in, tokens_of, whole_prompts
from tools.offline import generate

BLOCK_SIZE = 4
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def deploy(model: Path, num_blocks: int) -> Deployment:
    return Deployment.parse(
        {
            "model": {"path": model, "dtype": "float64"},
            "prefill": {"devices": ["cpu"], "kv_cache_bytes": num_blocks * BLOCK_BYTES, "prefix_cache": True},
            "decode": {"devices": ["cpu"], "kv_cache_bytes": 512 * BLOCK_BYTES},
            "block_size": BLOCK_SIZE,
        }
    )


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[[Deployment], Pair]]:
    pairs: list[Pair] = []

    def make(deployment: Deployment) -> Pair:
        pairs.append(Pair(deployment, tmp_path))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def make_requests(count: int) -> list[Request]:
    """Prompts out of few beginnings; some are the beginning itself, in whole blocks."""
    rng = random.Random(4)
    beginnings = [[rng.randrange(3, 380) for _ in range(length)] for length in (8, 12, 21, 30)]
    return [
        Request(
            request_id=index,
            prompt_token_ids=rng.choice(beginnings) + [rng.randrange(3, 380) for _ in range(rng.choice([0, 3, 9, 14]))],
            sampling=SamplingParams(max_tokens=rng.choice([1, 5]), temperature=1.0, seed=index, ignore_eos=True),
        )
        for index in range(count)
    ]


def cut(rng: random.Random, request: Request) -> list[PromptChunk]:
    """The prompt in chunks, from where the scheduler takes the cache to end: rightly, too early or too late."""
    start = rng.choice([0, rng.randrange(request.prompt_len)])
    chunks = []
    while start < request.prompt_len:
        length = rng.randint(1, request.prompt_len - start)
        first = request if not chunks else None
        start += length
        chunks.append(PromptChunk(request_id=request.request_id, end=start, request=first))
    return chunks


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["step by step", "launched ahead"])
@pytest.mark.parametrize("num_blocks", [44, 400], ids=["with eviction", "room for all"])
def test_shared_prefixes_in_chunks_with_cancels(
    model: Path,
    make_pair: Callable[[Deployment], Pair],
    monkeypatch: pytest.MonkeyPatch,
    num_blocks: int,
    runs_ahead: bool,
) -> None:
    monkeypatch.setattr(Engine, "runs_ahead", runs_ahead)
    rng = random.Random(num_blocks)
    requests = make_requests(48)
    pair = make_pair(deploy(model, num_blocks))
    cache = pair.prefill.loop.cache
    assert cache is not None
    events: list[Event] = []
    decode_events: list[Event] = []
    cancelled: set[int] = set()
    num_batches = 0
    for first in range(0, len(requests), 4):
        pending = [cut(rng, request) for request in requests[first : first + 4]]
        while any(pending):
            chunks = [chunks.pop(0) for chunks in pending if chunks and rng.random() < 0.7]
            events += pair.prefill.handle(RunPrompts(batch_id=num_batches, chunks=chunks))
            num_batches += 1
            events += pair.prefill.serve_once()
            cache.check_integrity()
            if rng.random() < 0.15:
                request = rng.choice(requests[first : first + 4])
                begun = (
                    not pending[request.request_id - first] or pending[request.request_id - first][0].request is None
                )
                if begun and request.request_id not in cancelled:
                    cancelled.add(request.request_id)
                    events += pair.prefill.handle(CancelRequests(request_ids=[request.request_id]))
                    pending[request.request_id - first] = []
        events += pair.prefill.run()
        going_on = [request for request in requests[first : first + 4] if request.request_id not in cancelled]
        pair.decode.handle(join(events, going_on))
        decode_events += pair.decode.run()
        while pair.prefill.loop.leases:
            events += pair.prefill.acknowledged()

    deployment = deploy(model, 512)
    alone = generate(load_engine(deployment, deployment.decode, CPU), requests)
    tokens = tokens_of(events + decode_events)
    for request_id, sequence in alone.items():
        if request_id in cancelled:
            assert tokens.get(request_id, []) == sequence.output_token_ids[: len(tokens.get(request_id, []))]
        else:
            assert tokens[request_id] == sequence.output_token_ids
    assert cancelled and len(cancelled) < len(requests) // 2
    pair.assert_empty()

    reports = [event for event in events if isinstance(event, PrefixReport)]
    assert sum(report.num_queried_tokens for report in reports) == sum(request.prompt_len for request in requests)
    assert sum(report.num_hit_tokens for report in reports) > 0.3 * sum(request.prompt_len for request in requests)
    stored: set[bytes] = set()
    for report in reports:
        stored = (stored - set(report.evicted)) | set(report.stored)
    assert len(stored) == num_blocks - pair.prefill.engine.blocks.num_free_blocks  # the index knows what is cached
    assert any(report.evicted for report in reports) == (num_blocks == 44)
    joined = [event for event in decode_events if isinstance(event, Joined)]
    handed_off = {request_id for event in joined for request_id in event.request_ids}
    num_blocks_of_prompts = sum(-(-requests[each].prompt_len // BLOCK_SIZE) for each in handed_off)
    num_copied_blocks = sum(num_bytes // BLOCK_BYTES for event in joined for num_bytes in event.transfer_bytes)
    assert 0 < num_copied_blocks < 0.6 * num_blocks_of_prompts  # the rest was there


@pytest.mark.parametrize("second_turn_at", ["decode", "prefill", "prefill, fetched"])
def test_a_second_turn_finds_the_first_one_where_it_was_decoded(
    model: Path, make_pair: Callable[[Deployment], Pair], second_turn_at: str
) -> None:
    """340 tokens that both turns begin with, of which 40 are the first answer: nothing of it comes twice."""
    rng = random.Random(11)
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    first = Request(request_id=1, prompt_token_ids=[rng.randrange(3, 380) for _ in range(300)], sampling=sampling)
    deployment = deploy(model, 400)
    alone = load_engine(deployment, deployment.decode, CPU)
    answer = generate(alone, [first])[1].output_token_ids
    question = [rng.randrange(3, 380) for _ in range(61)]
    second = Request(request_id=2, prompt_token_ids=first.prompt_token_ids + answer + question, sampling=sampling)
    pair = make_pair(deployment)
    pair.prefill.handle(whole_prompts([first]))
    events = pair.prefill.run()
    pair.decode.handle(join(events, [first]))
    events += pair.decode.run()
    pair.prefill.acknowledged()
    at = pair.decode if second_turn_at == "decode" else pair.prefill
    if second_turn_at == "prefill, fetched":
        fetch_prefix(pair, 77, second.prompt_token_ids)
        (fetched,) = fetched_in(pair.prefill.run())
        assert (fetched.lease_id, fetched.num_tokens, fetched.reason) == (77, 336, None)
        assert fetched.num_bytes == 36 // BLOCK_SIZE * BLOCK_BYTES  # the prompt of the first turn is there
        assert released_in(pair.decode.acknowledged()) == [77]
    at.handle(whole_prompts([second], stays=second_turn_at == "decode"))
    turn = at.run()
    pair.decode.handle(join(turn, [second]))
    num_computed = sum(each.timed.shape.num_prompt_tokens for each in turn if isinstance(each, StepDone) and each.timed)
    turn += pair.decode.run()
    assert tokens_of(events)[1] == answer
    assert tokens_of(turn)[2] == generate(alone, [second])[2].output_token_ids
    num_new = len(question) + (len(answer) if second_turn_at == "prefill" else 0)  # there it was not decoded
    assert num_computed <= 1.1 * num_new
    moved = [num_bytes for event in turn if isinstance(event, Joined) for num_bytes in event.transfer_bytes]
    if second_turn_at != "decode":
        assert sum(moved) <= (len(question) // BLOCK_SIZE + 2) * BLOCK_BYTES  # the ends are not whole blocks
        pair.prefill.acknowledged()
    pair.assert_empty()


@pytest.mark.parametrize("num_blocks", [60, 400], ids=["with eviction", "room for all"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "host"])
def test_prefixes_fetched_in_the_midst_of_evictions_cancels_and_a_dead_source(
    model: Path, make_pair: Callable[[Deployment], Pair], num_blocks: int, transport: str
) -> None:
    """Conversations of three turns. Before each a prefix is fetched, by chance while others run; leases are cancelled,
    and at the end the source is detached in the midst of a copy: no block stays leased, and every answer is right."""
    raw = deploy(model, num_blocks).model_dump() | {"transfer": {"transport": transport}}
    raw["decode"]["kv_cache_bytes"] = num_blocks * BLOCK_BYTES
    deployment, rng = Deployment.parse(raw), random.Random(num_blocks)
    pair, alone = make_pair(deployment), load_engine(deploy(model, 512), deployment.decode, CPU)
    caches = [replica.loop.cache for replica in (pair.prefill, pair.decode)]
    fetched: list[PrefixPulled] = []
    num_leases, num_cancelled = 0, 0

    def move(events: list[Event], requests: list[Request]) -> list[Event]:
        """A round of each replica; what is handed off in it goes on."""
        events = [*events, *pair.prefill.serve_once()]
        going_on = join(events, requests)
        if going_on.arrivals:
            pair.decode.handle(going_on)
        return events + pair.decode.serve_once()

    histories = [[rng.randrange(3, 380) for _ in range(rng.choice([12, 30, 41]))] for _ in range(4)]
    for turn in range(3):
        requests = [
            Request(
                request_id=10 * turn + index,
                prompt_token_ids=history,
                sampling=SamplingParams(max_tokens=9, temperature=1.0, seed=index, ignore_eos=True),
            )
            for index, history in enumerate(histories)
        ]
        events: list[Event] = []
        for request in requests:
            num_leases += 1
            lease_id = 1000 + num_leases
            if rng.random() < 0.2:  # its request has ended before the reader was told
                num_cancelled += 1
                pair.decode.handle(LeasePrefix(lease_id=-lease_id, hashes=block_hashes(histories[0], BLOCK_SIZE)))
                pair.decode.handle(CancelRequests(request_ids=[-lease_id]))
            new = fetch_prefix(pair, lease_id, request.prompt_token_ids)
            if rng.random() < 0.5:
                new += pair.prefill.run()
            pair.prefill.handle(whole_prompts([request], batch_id=request.request_id))
            events += move(new, requests)
        while any(replica.loop.has_work or replica.peers.attaching for replica in (pair.prefill, pair.decode)):
            events += move([], requests)
            assert all(cache is not None and cache.check_integrity() is None for cache in caches)
        while pair.prefill.loop.leases:
            pair.prefill.acknowledged()
        while pair.decode.loop.leases:
            pair.decode.acknowledged()
        tokens = tokens_of(events)
        for request, sequence in zip(requests, generate(alone, requests).values(), strict=True):
            assert tokens[request.request_id] == sequence.output_token_ids
        fetched += fetched_in(events)
        histories = [
            each.prompt_token_ids + tokens[each.request_id] + [rng.randrange(3, 380) for _ in range(5)]
            for each in requests
        ]
    assert num_cancelled and sum(each.num_bytes for each in fetched) > 0
    fetch_prefix(pair, 2000, histories[0])
    events = pair.prefill.handle(DetachPeer(address=pair.decode.address)) + pair.prefill.run()
    assert all(each.num_bytes == 0 for each in fetched_in(events))
    pair.decode.handle(CancelRequests(request_ids=[2000]))
    pair.assert_empty()
