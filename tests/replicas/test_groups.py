"""Replicas of several ranks say what one process says, whatever happens to their pools meanwhile."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from ensemble.config import Deployment
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, Launched, load_engine
from ensemble.protocol.replica_replica import ChunksReady, LinkOpened, OpenLink, ReadChunks
from ensemble.protocol.router_replica import (
    CancelRequests,
    Event,
    Joined,
    KVHandoff,
    PrefixReport,
    PromptChunk,
    PullsFailed,
    RunPrompts,
)
from ensemble.replicas.launched_steps import LaunchedSteps
from ensemble.replicas.peer_server import rank_address
from ensemble.request import Request, SamplingParams, Sequence
from tests.checkpoints import make_tiny_llama, make_tiny_opt
from tests.replicas.pair import (
    CPU,
    Pair,
    fetch_prefix,
    fetched_in,
    handoffs_of,
    join,
    released_in,
    swaps_in,
    tokens_of,
    whole_prompts,
)
from tests.replicas.ranks import GroupPair
from tests.transfer.test_links import CHUNK, Stranger
from tools.offline import generate

BLOCK_SIZE = 4
TOKEN_BYTES = 2 * 2 * 16 * 8  # key and value, KV heads, head_dim, float64; of a layer
BLOCK_BYTES = 2 * TOKEN_BYTES * BLOCK_SIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def stage(tp: int = 1, pp: int = 1, num_blocks: int = 256, **fields: Any) -> dict[str, Any]:
    """`num_blocks` of a rank that has all; at least so many of each of several."""
    kv_cache_bytes = num_blocks * BLOCK_BYTES // (min(tp, 2) * pp)
    return {"devices": ["cpu"] * tp * pp, "tp": tp, "pp": pp, "kv_cache_bytes": kv_cache_bytes} | fields


def deploy(model: Path, prefill: dict[str, Any], decode: dict[str, Any]) -> Deployment:
    raw = {"model": {"path": model, "dtype": "float64"}, "prefill": prefill, "decode": decode}
    return Deployment.parse(raw | {"block_size": BLOCK_SIZE})


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[[Deployment], Pair]]:
    pairs: list[Pair] = []

    def make(deployment: Deployment) -> Pair:
        pairs.append(GroupPair(deployment, tmp_path))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def make_requests(count: int, max_tokens: int = 12) -> list[Request]:
    """Greedy, drawn, penalised and log-probabilities."""
    rng = random.Random(7)
    kinds = [{"temperature": 0}, {}, {"repetition_penalty": 1.3, "temperature": 0}, {"num_logprobs": 2, "top_p": 0.9}]
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 3, 4, 5, 19]))],
            sampling=SamplingParams(max_tokens=rng.randint(1, max_tokens), seed=index, **kinds[index % 4]),
        )
        for index in range(count)
    ]


def expected_tokens(deployment: Deployment, requests: list[Request]) -> dict[int, list[int]]:
    """Of one rank with room for all."""
    alone = deploy(deployment.model.path, stage(), stage(num_blocks=1024))
    done = generate(load_engine(alone, alone.decode, CPU), requests)
    return {request_id: sequence.output_token_ids for request_id, sequence in done.items()}


SIX_HEADS = {"num_attention_heads": 6, "hidden_size": 96, "num_hidden_layers": 4}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: make_tiny_llama(path, **SIX_HEADS, num_key_value_heads=2),
    "llama-1-kv-head": lambda path: make_tiny_llama(path, **SIX_HEADS, num_key_value_heads=1, tie_word_embeddings=True),
    "opt": lambda path: make_tiny_opt(path, **SIX_HEADS, word_embed_proj_dim=96),
    "opt-350m": lambda path: make_tiny_opt(path, **SIX_HEADS, word_embed_proj_dim=32, do_layer_norm_before=False),
}


@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("llama", (3, 1), (1, 2)),
        ("llama", (1, 3), (2, 1)),
        ("llama-1-kv-head", (2, 1), (3, 1)),
        ("llama-1-kv-head", (1, 2), (1, 3)),
        ("opt", (2, 2), (1, 1)),
        ("opt", (1, 2), (3, 1)),
        ("opt-350m", (1, 1), (2, 2)),
        ("opt-350m", (1, 3), (1, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "tp{}pp{}".format(*value),
)
def test_any_degrees_on_either_side(
    name: str,
    prefill: tuple[int, int],
    decode: tuple[int, int],
    make_pair: Callable[[Deployment], Pair],
    tmp_path: Path,
) -> None:
    check_there_and_back(
        deploy(MODELS[name](tmp_path / "model"), stage(*prefill, num_blocks=2048), stage(*decode, num_blocks=2048)),
        make_pair,
    )


def test_any_split_of_layers_on_either_side(make_pair: Callable[[Deployment], Pair], tmp_path: Path) -> None:
    """Each rank's blocks are of its own layers; there are as many as the rank with the most layers has room for."""
    model = make_tiny_llama(tmp_path / "model", num_hidden_layers=5)
    prefill = stage(pp=2, num_blocks=2048, pipeline_layers=[1, 4])
    decode = stage(pp=3, num_blocks=2048, pipeline_layers=[2, 1, 2])
    pair = check_there_and_back(deploy(model, prefill, decode), make_pair)
    for replica, config, num_layers, most in ((pair.prefill, prefill, 1, 4), (pair.decode, decode, 2, 2)):
        pool = replica.engine.pool
        assert pool.tensor.shape[:2] == (config["kv_cache_bytes"] // (most * TOKEN_BYTES * BLOCK_SIZE), num_layers)
        assert replica.engine.block_bytes == 5 * TOKEN_BYTES * BLOCK_SIZE


def check_there_and_back(deployment: Deployment, make_pair: Callable[[Deployment], Pair]) -> Pair:
    """And back: of a second turn only what the first one did not have is computed, the answer's KV is fetched."""
    requests = make_requests(16)
    expected = expected_tokens(deployment, requests)
    pair = make_pair(deployment)

    def serve(requests: list[Request]) -> list[Event]:
        pair.prefill.handle(whole_prompts(requests))
        events = pair.prefill.run()
        pair.decode.handle(join(events, requests))
        events += pair.decode.run()
        while pair.prefill.loop.leases:
            pair.prefill.acknowledged()
        return events

    assert tokens_of(serve(requests)) == expected
    first = max(requests, key=lambda request: len(expected[request.request_id]))
    history = first.prompt_token_ids + expected[first.request_id]
    second = replace(first, request_id=100, prompt_token_ids=[*history, 5])
    fetch_prefix(pair, 200, history[:-1])  # the last token is not computed
    (fetched,) = fetched_in(pair.prefill.run())
    assert fetched.reason is None and fetched.num_tokens == (len(history) - 1) // BLOCK_SIZE * BLOCK_SIZE
    num_blocks, rest = divmod(fetched.num_bytes, pair.prefill.engine.block_bytes)
    assert num_blocks > 0 and not rest and pair.decode.acknowledged()
    events = serve([second])
    assert tokens_of(events)[100] == expected_tokens(deployment, [second])[100]
    num_hit_tokens = sum(event.num_hit_tokens for event in events if isinstance(event, PrefixReport))
    assert num_hit_tokens == fetched.num_tokens
    pair.assert_empty()
    return pair


@pytest.mark.parametrize("transport", ["host", "nccl"])
def test_over_links_and_again_when_they_broke(
    transport: str, model: Path, make_pair: Callable[[Deployment], Pair]
) -> None:
    raw = deploy(model, stage(tp=2), stage(pp=2)).model_dump() | {"transfer": {"transport": transport}}
    deployment = Deployment.parse(raw)
    requests = make_requests(8, max_tokens=6)
    expected = expected_tokens(deployment, requests)
    pair = make_pair(deployment)

    def hand_off(requests: list[Request]) -> list[Event]:
        pair.prefill.handle(whole_prompts(requests))
        events = pair.prefill.run()
        pair.decode.handle(join(events, requests))
        events += pair.decode.run()
        while pair.prefill.loop.leases:
            pair.prefill.acknowledged()
        pair.assert_empty()
        return events

    events = hand_off(requests)
    assert tokens_of(events) == expected
    assert {each for event in events if isinstance(event, Joined) for each in event.transports} == {transport}
    again = [replace(request, request_id=request.request_id + 100) for request in requests]
    pair.prefill.server._links.close()  # of the leader's pool, which both ranks read
    failed = {reason for event in hand_off(again) if isinstance(event, PullsFailed) for reason in event.reasons}
    assert failed
    later = [replace(request, request_id=request.request_id + 200) for request in requests]
    assert tokens_of(hand_off(later)) == {request_id + 200: tokens for request_id, tokens in expected.items()}


def test_any_rank_reads_for_its_leader_s_leases_alone(model: Path, make_pair: Callable[[Deployment], Pair]) -> None:
    """A late reader is refused by the rank that it asks, when its blocks may have become another's."""
    pair = make_pair(deploy(model, stage(pp=2, num_blocks=4, prefix_cache=False), stage()))
    sampling = SamplingParams(max_tokens=2)
    first, second = (Request(request_id=i, prompt_token_ids=[5 + i] * 12, sampling=sampling) for i in range(2))
    strangers = [Stranger(rank_address(pair.prefill.address, rank)) for rank in range(2)]

    def read_by_each(handoff: KVHandoff) -> list[Any]:
        for stranger in strangers:
            assert isinstance(stranger.ask(OpenLink(carrier="frames", num_slots=4, slot_bytes=8192)), LinkOpened)
        chunk = replace(CHUNK, request_id=handoff.request_id, num_heads=2, block_ids=handoff.block_ids)
        return [stranger.ask(ReadChunks(chunks=[chunk])) for stranger in strangers]

    pair.prefill.handle(whole_prompts([first]))
    [handoff] = handoffs_of(pair.prefill.run()).values()
    assert all(isinstance(answer, ChunksReady) for answer in read_by_each(handoff))
    pair.prefill.handle(CancelRequests(request_ids=[first.request_id]))
    pair.prefill.handle(whole_prompts([second]))
    [other] = handoffs_of(pair.prefill.run()).values()
    assert set(other.block_ids) & set(handoff.block_ids)
    assert {answer.reason for answer in read_by_each(handoff)} == {"request_id = 0: one with a lease is wanted"}
    assert all(isinstance(answer, ChunksReady) for answer in read_by_each(other))
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["step by step", "launched ahead"])
def test_tokens_are_those_of_one_rank_and_every_block_comes_back(
    runs_ahead: bool, model: Path, make_pair: Callable[[Deployment], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(model, stage(tp=2), stage(tp=2))
    requests = make_requests(16)
    expected = expected_tokens(deployment, requests)
    monkeypatch.setattr(Engine, "runs_ahead", runs_ahead)
    pair = make_pair(deployment)
    pair.prefill.handle(whole_prompts(requests))
    prefill_events = pair.prefill.run()
    assert pair.decode.handle(join(prefill_events, requests)) == []
    decode_events = pair.decode.run()
    assert tokens_of(prefill_events + decode_events) == expected
    while pair.prefill.loop.leases:
        prefill_events += pair.prefill.acknowledged()
    pair.assert_empty()


def cut(rng: random.Random, request: Request) -> list[PromptChunk]:
    """The prompt in chunks."""
    chunks, start = [], 0
    while start < request.prompt_len:
        start = rng.randint(start + 1, request.prompt_len)
        chunks.append(PromptChunk(request_id=request.request_id, end=start, request=None if chunks else request))
    return chunks


def run_with_chunks_and_cancels(pair: Pair, requests: list[Request], rng: random.Random) -> list[Event]:
    """A few prompts at a time, in chunks; sequences go on at the decode replica, and some are cancelled anywhere."""
    events: list[Event] = []
    waiting, cancelled = list(requests), set[int]()
    while waiting or pair.prefill.loop.has_work or pair.decode.loop.has_work or pair.prefill.loop.leases:
        if waiting and rng.random() < 0.5:
            chunks = [chunk for request in waiting[:3] for chunk in cut(rng, request)]
            del waiting[:3]
            pair.prefill.handle(RunPrompts(batch_id=len(waiting), chunks=chunks))
        victims = [each.request_id for each in requests if each.request_id % 5 == 4 and rng.random() < 0.02]
        for replica in (pair.prefill, pair.decode):
            events += replica.handle(CancelRequests(request_ids=victims))
        cancelled.update(victims)
        prefill_events = pair.prefill.serve_once()
        events += prefill_events
        going_on = join(prefill_events, [each for each in requests if each.request_id not in cancelled])
        events += pair.prefill.handle(
            CancelRequests(request_ids=[each for each in pair.prefill.loop.leases if each in cancelled])
        )
        if going_on.arrivals:
            events += pair.decode.handle(going_on)
        events += pair.decode.serve_once()
        pair.prefill.check_integrity()
        pair.decode.check_integrity()
    return events


@pytest.mark.parametrize(
    ("tp", "pp", "runs_ahead"),
    [(2, 1, False), (2, 1, True), (1, 2, False)],
    ids=["tp, step by step", "tp, launched ahead", "pp"],
)
def test_swaps_cached_prefixes_chunks_and_cancels(
    tp: int,
    pp: int,
    runs_ahead: bool,
    model: Path,
    make_pair: Callable[[Deployment], Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = {
        "policy": "mlfq",
        "quantum_s": 0.001,
        "starvation_s": 0.05,
        "max_num_seqs": 6,
        "max_num_resident_seqs": 40,
        "host_kv_bytes": 120 * BLOCK_BYTES,
        "admission": "reserved",
    }
    deployment = deploy(model, stage(tp, pp, prefix_cache=True), stage(tp, pp, num_blocks=18, **decode))
    rng = random.Random(3)
    beginnings = [[rng.randrange(3, 380) for _ in range(length)] for length in (8, 12, 21)]
    requests = [
        Request(
            request_id=index,
            prompt_token_ids=rng.choice(beginnings) + [rng.randrange(3, 380) for _ in range(rng.choice([0, 3, 9]))],
            sampling=SamplingParams(max_tokens=rng.choice([1, 9, 20]), temperature=index % 2, seed=index),
        )
        for index in range(30)
    ]
    expected = expected_tokens(deployment, requests)
    monkeypatch.setattr(Engine, "runs_ahead", runs_ahead)
    pair = make_pair(deployment)
    events = run_with_chunks_and_cancels(pair, requests, rng)
    tokens = tokens_of(events)
    for request in requests:
        said, wanted = tokens.get(request.request_id, []), expected[request.request_id]
        assert said == (wanted[: len(said)] if request.request_id % 5 == 4 else wanted)
    num_blocks, rest = divmod(sum(report.bytes_in for report in swaps_in(events)), BLOCK_BYTES)  # of all ranks
    assert num_blocks > 0 and not rest
    assert sum(event.num_hit_tokens for event in events if isinstance(event, PrefixReport)) > 0
    assert len(released_in(events)) > 0
    pair.assert_empty()


def test_steps_of_a_pipeline_are_timed_as_one_place_s_whether_the_others_are_idle_or_not() -> None:
    """Places of 10 ms: alone a step takes 30 ms, in a row 10 ms lie between two ends."""

    class Places:
        is_pipeline, max_num_unread = True, 2
        now, free_at = 0.0, [0.0, 0.0, 0.0]

        def launch(self, batch: Batch) -> Launched:
            end = self.now
            for place, free_at in enumerate(self.free_at):
                end = self.free_at[place] = max(end, free_at) + 0.01
            return Launched(batch, cast(Any, end))

        def commit(self, launched: Launched, log_probs_of: None) -> list[Sequence]:
            self.now = max(self.now, cast(float, launched.handle))
            return []

    places = Places()
    steps = LaunchedSteps(cast(Engine, places), None, lambda: places.now)
    seconds = []
    for number in range(9):
        steps.launch(Batch([], []), [])
        if number < 3 or len(steps) > 2:  # three alone, then as many in flight as there are places
            seconds.append(steps.commit()[2].seconds)
    assert seconds[:3] == pytest.approx([0.01] * 3) and seconds[-3:] == pytest.approx([0.01] * 3)


def test_a_pipeline_has_as_many_steps_in_flight_as_places(
    model: Path, make_pair: Callable[[Deployment], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one prompt stream; the decode batch is split, and no sequence decodes in two steps at once."""
    deployment = deploy(model, stage(pp=2, max_num_batched_tokens=16), stage(pp=2))
    pair = make_pair(deployment)
    in_flight: dict[str, list[Launched]] = {"prefill": [], "decode": []}
    at_once: dict[str, list[list[Launched]]] = {"prefill": [], "decode": []}
    for name, replica in (("prefill", pair.prefill), ("decode", pair.decode)):
        launch, commit = replica.engine.launch, replica.engine.commit

        def launched(batch: Batch, name: str = name, launch: Any = launch) -> Launched:
            in_flight[name].append(launch(batch))
            at_once[name].append(list(in_flight[name]))
            return in_flight[name][-1]

        def committed(step: Launched, *args: Any, name: str = name, commit: Any = commit) -> list[Sequence]:
            in_flight[name].remove(step)
            return commit(step, *args)

        monkeypatch.setattr(replica.engine, "launch", launched)
        monkeypatch.setattr(replica.engine, "commit", committed)
    sampling = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    requests = [Request(request_id=i, prompt_token_ids=[5 + i] * 64, sampling=sampling) for i in range(5)]
    pair.prefill.handle(whole_prompts(requests))
    events = pair.prefill.run()
    pair.decode.handle(join(events, requests))
    pair.decode.run()
    for name in ("prefill", "decode"):
        assert max(map(len, at_once[name])) == 2
    prompts = [[row.sequence.request_id for row in step.batch.prefills] for pair in at_once["prefill"] for step in pair]
    assert prompts.count([0]) > 4, "chunks of a prompt are in flight together"
    for steps in at_once["decode"]:
        ids = [sequence.request_id for step in steps for sequence in step.batch.decodes]
        assert len(ids) == len(set(ids))
        assert all(len(step.batch.decodes) <= 3 for step in steps)
