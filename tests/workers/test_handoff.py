"""A prefill and a decode worker in one process, with real engines: what a sequence goes through between them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from ensemble.config import Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.request import Request, SamplingParams
from ensemble.workers.decode_worker import DecodeWorker
from ensemble.workers.messages import (
    CancelRequests,
    KVHandoff,
    PrefillAnswer,
    PrefillBatch,
    PrefillChunk,
    Released,
    StepTokens,
    SubmitDecode,
    WorkerEvent,
)
from ensemble.workers.peers import Peers, PeerServer
from ensemble.workers.prefill_worker import PrefillWorker
from tests.checkpoints import make_tiny_llama
from tools.offline import generate

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 64, 4


class Pair:
    """The two workers, with the sockets that join them."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        self.prefill_engine = load_engine(deployment, deployment.prefill, CPU)
        self.decode_engine = load_engine(deployment, deployment.decode, CPU)
        self.context = zmq.Context()
        address = f"ipc://{run_dir}/peer"
        self.server = PeerServer(self.context, address, self.prefill_engine.pool)
        self.prefill = PrefillWorker(self.prefill_engine, address)
        self.peers = Peers(self.context, CPU)
        self.decode = DecodeWorker(self.decode_engine, self.peers, max_num_seqs=16)

    def run_prefill(self) -> list[WorkerEvent]:
        events: list[WorkerEvent] = []
        while self.prefill.has_work:
            events += self.prefill.step()
        return events

    def run_decode(self) -> list[WorkerEvent]:
        events: list[WorkerEvent] = []
        while self.decode.has_work or self.peers.attaching:
            if self.peers.receive_handles():
                self.decode.start_pulls()
            if self.decode.has_work:
                events += self.decode.step()
        return events

    def acknowledged(self) -> list[WorkerEvent]:
        self.server.socket.poll(1000)
        return self.prefill.end_leases(self.server.acknowledged())

    def assert_empty(self) -> None:
        for engine in (self.prefill_engine, self.decode_engine):
            engine.blocks.check_integrity()
            assert engine.blocks.num_free_blocks == engine.pool.num_blocks


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
    pair.server.close()
    pair.peers.close()
    pair.context.term()


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


def whole_prompts(requests: list[Request]) -> PrefillBatch:
    chunks = [
        PrefillChunk(request_id=each.request_id, start=0, length=each.prompt_len, request=each) for each in requests
    ]
    return PrefillBatch(replica=0, batch_id=0, chunks=chunks)


def handoffs_of(events: list[WorkerEvent]) -> list[KVHandoff]:
    return [
        result.handoff
        for event in events
        if isinstance(event, PrefillAnswer)
        for result in event.results
        if result.handoff is not None
    ]


def tokens_of(events: list[WorkerEvent]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, PrefillAnswer):
            for result in event.results:
                tokens.setdefault(result.request_id, []).append(result.token_id)
        if isinstance(event, StepTokens):
            for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                tokens.setdefault(request_id, []).append(token_id)
    return tokens


def released_in(events: list[WorkerEvent]) -> list[int]:
    return [request_id for event in events if isinstance(event, Released) for request_id in event.request_ids]


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
