"""Two replicas in one process, with real engines: what a sequence goes through between them."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from ensemble.config import Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.protocol.router_replica import (
    Arrival,
    AttachFailed,
    AttachPeer,
    CancelRequests,
    DetachPeer,
    HandedOff,
    HandOff,
    Join,
    Joined,
    PromptChunk,
    PullsFailed,
    RunPrompts,
    StepDone,
)
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU, Pair, handoffs_of, join, released_in, tokens_of, whole_prompts
from tools.offline import generate

NUM_BLOCKS, BLOCK_SIZE = 64, 4


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    path = make_tiny_llama(tmp_path_factory.mktemp("llama"))
    stage = {"devices": ["cpu"], "kv_cache_bytes": NUM_BLOCKS * 2 * 2 * 2 * BLOCK_SIZE * 16 * 8}
    return Deployment.parse(
        {
            "model": {"path": path, "dtype": "float64"},
            "prefill": stage,
            "decode": stage,
            "block_size": BLOCK_SIZE,
        }
    )


@pytest.fixture
def pair(deployment: Deployment, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(deployment, tmp_path)
    yield pair
    pair.close()


def make_requests(count: int, temperature: float) -> list[Request]:
    rng = random.Random(7)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.choice([1, 3, 4, 5, 19]))],
            sampling=SamplingParams(
                max_tokens=rng.randint(1, 12), temperature=temperature, seed=index, ignore_eos=index % 2 == 0
            ),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_equal_those_of_one_engine_and_every_block_comes_back(
    pair: Pair, deployment: Deployment, temperature: float
) -> None:
    requests = make_requests(12, temperature)
    alone: Engine = load_engine(deployment, deployment.decode, CPU)
    expected = {request_id: sequence.output_token_ids for request_id, sequence in generate(alone, requests).items()}

    pair.prefill.handle(whole_prompts(requests))
    prefill_events = pair.prefill.run()
    handoffs = handoffs_of(prefill_events)
    assert pair.decode.handle(join(prefill_events, requests)) == []
    decode_events = pair.decode.run()

    assert tokens_of(prefill_events + decode_events) == expected
    while pair.prefill.loop.leases:
        prefill_events += pair.prefill.acknowledged()
    assert sorted(released_in(prefill_events)) == [each.request_id for each in requests]
    assert sorted(released_in(decode_events)) == sorted(handoffs)
    joined = [event for event in decode_events if isinstance(event, Joined)]
    assert sorted(request_id for event in joined for request_id in event.request_ids) == sorted(handoffs)
    num_blocks = sum(len(handoff.block_ids) for handoff in handoffs.values())
    assert sum(sum(event.transfer_bytes) for event in joined) == num_blocks * pair.decode.engine.pool.layout.block_bytes
    pair.assert_empty()


def test_who_joins_is_told_of_before_its_first_step(pair: Pair) -> None:
    """Else that step would count as hand-off, on a CPU whose steps are run where they are launched."""
    requests = make_long_requests(3)
    pair.prefill.handle(whole_prompts(requests))
    pair.decode.handle(join(pair.prefill.run(), requests))
    joined: set[int] = set()
    while pair.decode.loop.has_work or pair.decode.peers.attaching:
        events = pair.decode.serve_once()
        for event in events:
            if isinstance(event, StepDone):
                assert joined.issuperset(event.request_ids)
        joined.update(*(event.request_ids for event in events if isinstance(event, Joined)))
    assert joined == {0, 1, 2}


def deploy_by(deployment: Deployment, transport: str) -> Deployment:
    return Deployment.parse(deployment.model_dump() | {"transfer": {"transport": transport}})


@pytest.mark.parametrize("transport", ["host", "nccl"])
def test_tokens_are_the_same_by_every_transport(deployment: Deployment, tmp_path: Path, transport: str) -> None:
    requests = make_requests(12, 1.0)
    alone: Engine = load_engine(deployment, deployment.decode, CPU)
    expected = {request_id: sequence.output_token_ids for request_id, sequence in generate(alone, requests).items()}
    pair = Pair(deploy_by(deployment, transport), tmp_path)
    try:
        pair.prefill.handle(whole_prompts(requests))
        events = pair.prefill.run()
        pair.decode.handle(join(events, requests))
        events += pair.decode.run()
        assert tokens_of(events) == expected
        joined = [event for event in events if isinstance(event, Joined)]
        assert {each for event in joined for each in event.transports} == {transport}
        while pair.prefill.loop.leases:
            pair.prefill.acknowledged()
        pair.assert_empty()
    finally:
        pair.close()


def test_a_broken_link_costs_its_sequences_a_prefill_and_is_made_anew(deployment: Deployment, tmp_path: Path) -> None:
    requests = make_long_requests(5)
    pair = Pair(deploy_by(deployment, "host"), tmp_path)
    try:
        for request in requests[:4]:
            pair.prefill.handle(whole_prompts([request]))
            events = pair.prefill.run()
            pair.decode.handle(AttachPeer(address=pair.prefill.address))
            while pair.decode.peers.attaching:
                events += pair.decode.serve_once()
            pair.prefill.server._links.close()  # as a source does of links that it has too many of
            pair.decode.handle(join(events, [request]))
            events += pair.decode.run()
            [failed] = [event for event in events if isinstance(event, PullsFailed)]
            assert "link: one that is open is wanted" in failed.reasons[request.request_id]
            assert released_in(events) == [request.request_id]
            pair.prefill.acknowledged()
            pair.assert_empty()
            is_given_up = any(isinstance(event, AttachFailed) for event in events)
            assert is_given_up == (request.request_id == 3)
        assert pair.decode.peers.why_unmappable(pair.prefill.address) is not None
        pair.decode.handle(DetachPeer(address=pair.prefill.address))  # its next life begins
        pair.prefill.handle(whole_prompts(requests[4:]))
        events = pair.prefill.run()
        pair.decode.handle(join(events, requests[4:]))
        events += pair.decode.run()
        assert len(tokens_of(events)[4]) == 40
        pair.prefill.acknowledged()
        pair.assert_empty()
    finally:
        pair.close()


def test_source_blocks_stay_until_the_copy_is_acknowledged(pair: Pair) -> None:
    requests = make_requests(4, 0.0)
    pair.prefill.handle(whole_prompts(requests))
    events = pair.prefill.run()
    handoffs = handoffs_of(events)
    leased = sum(len(each.block_ids) for each in handoffs.values())
    assert leased and pair.prefill.loop.num_free_blocks == NUM_BLOCKS - leased

    pair.decode.handle(join(events, requests))
    assert pair.prefill.loop.num_free_blocks == NUM_BLOCKS - leased
    pair.decode.run()
    released: list[int] = []
    while len(released) < len(handoffs):
        released += released_in(pair.prefill.acknowledged())
    assert sorted(released) == sorted(handoffs)
    pair.assert_empty()


def make_long_requests(count: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    return [Request(request_id=index, prompt_token_ids=[5] * 9, sampling=sampling) for index in range(count)]


def in_every_state(pair: Pair, requests: list[Request]) -> None:
    """0 in prefill between two chunks, 1 under lease in the bridge, 2 on its way to decode, 3 running there."""
    first_chunk = PromptChunk(request_id=0, end=4, request=requests[0])
    pair.prefill.handle(RunPrompts(batch_id=1, chunks=[first_chunk]))
    pair.prefill.handle(whole_prompts(requests[1:]))
    events = pair.prefill.run()
    assert handoffs_of(events).keys() == {1, 2, 3}
    pair.decode.handle(join(events, [requests[3]]))
    while 3 not in tokens_of(pair.decode.serve_once()):
        pass
    pair.decode.handle(join(events, [requests[2]]))


def test_cancel_frees_everything_in_every_state(pair: Pair) -> None:
    in_every_state(pair, make_long_requests(4))
    assert released_in(pair.prefill.handle(CancelRequests(request_ids=[0, 1]))) == [0, 1]
    events = pair.decode.handle(CancelRequests(request_ids=[2, 3]))
    events += pair.decode.run()
    assert sorted(released_in(events)) == [2, 3]
    assert 2 not in tokens_of(events)

    released: list[int] = []
    while len(released) < 2:
        released += released_in(pair.prefill.acknowledged())
    assert sorted(released) == [2, 3]
    pair.assert_empty()


def test_all_that_a_replica_has_can_be_ended_at_once(pair: Pair) -> None:
    """As when another router takes over: nothing of what the old one asked for is left, in whatever state it was."""
    requests = make_long_requests(6)
    in_every_state(pair, requests[:4])
    pair.prefill.handle(RunPrompts(batch_id=2, chunks=[PromptChunk(request_id=4, end=3, request=requests[4])]))
    pair.decode.handle(whole_prompts([requests[5]], stays=True))
    for replica in (pair.decode, pair.prefill):
        assert not replica.loop.is_empty
        events = replica.loop.cancel_all()
        while not replica.loop.is_empty:
            events += replica.loop.step()
        assert tokens_of(events) == {}
        replica.assert_empty()
    assert pair.prefill.acknowledged() == []  # the leases had ended


def test_cancelling_twice_or_what_is_unknown_says_nothing(pair: Pair) -> None:
    pair.decode.handle(whole_prompts(make_long_requests(1), stays=True))
    pair.decode.serve_once()
    assert released_in(pair.decode.handle(CancelRequests(request_ids=[0, 0, 7]))) == [0]
    assert pair.decode.handle(CancelRequests(request_ids=[0])) == []
    pair.assert_empty()


def test_chunk_of_a_cancelled_prompt_is_skipped_and_its_batch_still_ends(pair: Pair) -> None:
    requests = make_requests(2, 0.0)
    pair.prefill.handle(whole_prompts(requests))
    assert released_in(pair.prefill.handle(CancelRequests(request_ids=[0]))) == [0]
    steps = [event for event in pair.prefill.run() if isinstance(event, StepDone)]
    assert [request_id for step in steps for request_id in step.request_ids] == [1]
    pair.prefill.handle(CancelRequests(request_ids=[1]))
    pair.prefill.handle(whole_prompts([requests[0]], batch_id=5))
    pair.prefill.handle(CancelRequests(request_ids=[0]))
    [step] = pair.prefill.run()
    assert isinstance(step, StepDone) and step.batch_ids == [5] and step.request_ids == []
    pair.assert_empty()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_what_is_handed_off_may_go_on_where_it_is(deployment: Deployment, tmp_path: Path, prefix_cache: bool) -> None:
    """Its lease becomes what it decodes from: nothing is copied, and a cancelled lease is not taken up."""
    requests = make_requests(12, 1.0)
    alone = load_engine(deployment, deployment.decode, CPU)
    expected = {request_id: sequence.output_token_ids for request_id, sequence in generate(alone, requests).items()}
    raw = deployment.model_dump()
    raw["prefill"]["prefix_cache"] = prefix_cache
    pair = Pair(Deployment.parse(raw), tmp_path)
    replica = pair.decode
    try:
        replica.handle(whole_prompts(requests))
        events = replica.run()
        handoffs = handoffs_of(events)
        cancelled = min(handoffs)
        going_on = join(events, requests)
        events += replica.handle(CancelRequests(request_ids=[cancelled]))
        joined = replica.handle(going_on)
        assert [event.request_ids for event in joined if isinstance(event, Joined)] == [
            [request_id] for request_id in handoffs if request_id != cancelled
        ]
        assert all(event.transfer_bytes == [0] for event in joined if isinstance(event, Joined))
        events += joined + replica.run()
        expected[cancelled] = expected[cancelled][:1]
        assert tokens_of(events) == expected
        assert sorted(released_in(events)) == [each.request_id for each in requests]
        replica.assert_empty()
    finally:
        pair.close()


def test_an_arrival_that_waits_for_blocks_starts_when_a_lease_ends(deployment: Deployment, tmp_path: Path) -> None:
    """Nothing else is going on that would make the replica look."""
    raw = deployment.model_dump()
    raw["decode"]["kv_cache_bytes"] = 10 * 2 * 2 * 2 * BLOCK_SIZE * 16 * 8
    pair = Pair(Deployment.parse(raw), tmp_path)
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    leased, arriving = (Request(request_id=index, prompt_token_ids=[7] * 24, sampling=sampling) for index in range(2))
    try:
        pair.decode.handle(whole_prompts([leased]))
        pair.decode.run()
        pair.prefill.handle(whole_prompts([arriving]))
        events = pair.prefill.run()
        pair.decode.handle(join(events, [arriving]))
        events += pair.decode.run()
        assert len(tokens_of(events)[1]) == 1  # 6 of 10 blocks are leased
        pair.decode.loop.end_leases([0])
        events += pair.decode.run()
        assert len(tokens_of(events)[1]) == 3
    finally:
        pair.close()


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"life": 3}, "life = 3: .* is in life 0"),
        ({"block_ids": [0, 1, 1 << 40]}, "block_ids = .1099511627776.: below 64 are wanted"),
        ({"block_ids": [0, -1, 2]}, "block_ids = .-1.: below 64 are wanted"),
        ({"block_ids": [0]}, "block_ids: 3 for 9 tokens are wanted, not 1"),
    ],
)
def test_a_stale_or_made_up_reference_is_refused_by_name_and_costs_no_block(pair: Pair, lie: dict, reason: str) -> None:
    true, false = make_long_requests(2)
    pair.prefill.handle(whole_prompts([true, false]))
    events = pair.prefill.run()
    [first, second] = join(events, [true, false]).arrivals
    pair.decode.handle(Join(arrivals=[first, replace(second, handoff=replace(second.handoff, **lie))]))
    events += pair.decode.run()
    assert len(tokens_of(events)[0]) == 40
    [failed] = [event for event in events if isinstance(event, PullsFailed)]
    assert failed.reasons.keys() == {1} and re.search(reason, failed.reasons[1])
    assert sorted(released_in(events)) == [0, 1]
    while pair.prefill.loop.leases:
        pair.prefill.acknowledged()
    pair.assert_empty()


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["step by step", "launched ahead"])
def test_running_sequences_go_over_in_the_midst_of_their_answers(
    pair: Pair, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    """From decode to where they were prefilled, and what ends or is cancelled on the way ends there."""
    requests = [replace(each, sampling=replace(each.sampling, max_tokens=12)) for each in make_requests(6, 1.0)]
    alone = generate(load_engine(deployment, deployment.decode, CPU), requests)
    monkeypatch.setattr(Engine, "runs_ahead", runs_ahead)
    pair.prefill.handle(whole_prompts(requests))
    events = pair.prefill.run()
    pair.decode.handle(join(events, requests))
    while pair.decode.loop._arrivals.request_ids or max(len(each) for each in tokens_of(events).values()) < 5:
        events += pair.decode.serve_once()
    events += pair.decode.handle(HandOff(request_ids=[each.request_id for each in requests]))
    events += pair.decode.handle(CancelRequests(request_ids=[requests[-1].request_id]))
    events += pair.decode.run()
    while pair.prefill.loop.leases:
        pair.prefill.acknowledged()
    handoffs = [each for event in events if isinstance(event, HandedOff) for each in event.handoffs]
    told = tokens_of(events)
    by_id = {each.request_id: each for each in requests}
    going = {each.request_id for each in handoffs} - {requests[-1].request_id}
    assert len(going) >= 3 and set(pair.decode.loop.leases) >= going
    pair.prefill.handle(
        Join(
            arrivals=[
                Arrival(request=by_id[each.request_id], output_token_ids=told[each.request_id], handoff=each)
                for each in handoffs
                if each.request_id in going
            ]
        )
    )
    events += pair.prefill.run()
    while pair.decode.loop.leases:
        pair.decode.acknowledged()
    for request_id, sequence in alone.items():
        said = tokens_of(events)[request_id]
        assert said == sequence.output_token_ids[: len(said)]
        assert len(said) == len(sequence.output_token_ids) or request_id == requests[-1].request_id
    pair.assert_empty()
