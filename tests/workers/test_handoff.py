"""A prefill and a decode worker in one process, with real engines: what a sequence goes through between them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.config import Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.request import Request, SamplingParams
from ensemble.workers.messages import CancelRequests, PrefillAnswer, PrefillBatch, PrefillChunk, SubmitDecode
from tests.checkpoints import make_tiny_llama
from tests.workers.pair import CPU, Pair, handoffs_of, released_in, tokens_of, whole_prompts
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
    prefill_events = pair.run_prefill()
    handoffs = handoffs_of(prefill_events)
    pair.decode.handle(SubmitDecode(replica=0, handoffs=handoffs))
    decode_events = pair.run_decode()

    assert tokens_of(prefill_events + decode_events) == expected
    lease_events = pair.acknowledged()
    assert sorted(released_in(prefill_events + lease_events)) == [each.request_id for each in requests]
    assert sorted(released_in(decode_events)) == sorted(each.request.request_id for each in handoffs)
    pair.assert_empty()


def test_source_blocks_stay_until_the_copy_is_acknowledged(pair: Pair) -> None:
    requests = make_requests(4, 0.0)
    pair.prefill.handle(whole_prompts(requests))
    handoffs = handoffs_of(pair.run_prefill())
    leased = sum(len(each.block_ids) for each in handoffs)
    assert pair.prefill_engine.blocks.num_free_blocks == NUM_BLOCKS - leased

    pair.decode.handle(SubmitDecode(replica=0, handoffs=handoffs))
    assert pair.prefill_engine.blocks.num_free_blocks == NUM_BLOCKS - leased
    pair.run_decode()
    assert sorted(released_in(pair.acknowledged())) == sorted(each.request.request_id for each in handoffs)
    pair.assert_empty()


def test_cancel_frees_everything_in_every_state(pair: Pair) -> None:
    requests = [
        Request(request_id=i, prompt_token_ids=[5] * 9, sampling=SamplingParams(max_tokens=40, ignore_eos=True))
        for i in range(4)
    ]
    # 0 in prefill between two chunks, 1 under lease in the bridge, 2 on its way to decode, 3 running there
    first_chunk = PrefillChunk(request_id=0, start=0, length=4, request=requests[0])
    pair.prefill.handle(PrefillBatch(replica=0, batch_id=1, chunks=[first_chunk]))
    pair.prefill.handle(whole_prompts(requests[1:]))
    handoffs = {each.request.request_id: each for each in handoffs_of(pair.run_prefill())}
    assert released_in(pair.prefill.handle(CancelRequests(replica=0, request_ids=[0, 1]))) == [0, 1]

    pair.decode.handle(SubmitDecode(replica=0, handoffs=[handoffs[3]]))
    while 3 not in tokens_of(pair.decode.step() if pair.decode.has_work else []):
        if pair.peers.receive_handles():
            pair.decode.start_pulls()
    pair.decode.handle(SubmitDecode(replica=0, handoffs=[handoffs[2]]))
    events = pair.decode.handle(CancelRequests(replica=0, request_ids=[2, 3]))
    events += pair.run_decode()
    assert sorted(released_in(events)) == [2, 3]
    assert 2 not in tokens_of(events)

    released: list[int] = []
    while len(released) < 2:
        released += released_in(pair.acknowledged())
    assert sorted(released) == [2, 3]
    pair.assert_empty()


def test_chunk_of_a_cancelled_prompt_is_skipped(pair: Pair) -> None:
    requests = make_requests(2, 0.0)
    pair.prefill.handle(whole_prompts(requests))
    assert released_in(pair.prefill.handle(CancelRequests(replica=0, request_ids=[0]))) == [0]
    answers = [event for event in pair.run_prefill() if isinstance(event, PrefillAnswer)]
    assert [result.request_id for answer in answers for result in answer.results] == [1]
    pair.prefill.handle(CancelRequests(replica=0, request_ids=[1]))
    pair.assert_empty()
