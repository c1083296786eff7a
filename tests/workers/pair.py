"""A prefill and a decode worker in one process, with real engines, and what their events say."""

from pathlib import Path

import torch
import zmq

from ensemble.config import Deployment
from ensemble.engine.engine import load_engine
from ensemble.request import Request
from ensemble.workers.decode_worker import DecodeWorker
from ensemble.workers.messages import (
    KVHandoff,
    LocalPrefilled,
    PrefillAnswer,
    PrefillBatch,
    PrefillChunk,
    Released,
    StepTokens,
    WorkerEvent,
)
from ensemble.workers.peers import Peers, PeerServer
from ensemble.workers.prefill_worker import PrefillWorker

CPU = torch.device("cpu")


class Pair:
    """The two workers, with the sockets that join them."""

    def __init__(self, deployment: Deployment, run_dir: Path, device: torch.device = CPU) -> None:
        self.prefill_engine = load_engine(deployment, deployment.prefill, device)
        self.decode_engine = load_engine(deployment, deployment.decode, device)
        self.context = zmq.Context()
        address = f"ipc://{run_dir}/peer"
        self.server = PeerServer(self.context, address, self.prefill_engine.pool)
        self.prefill = PrefillWorker(self.prefill_engine, address, deployment.prefill.prefix_cache)
        self.peers = Peers(self.context, device)
        if device.type == "cuda":  # CUDA opens no handle of the process that made it
            self.peers._pools[address] = self.prefill_engine.pool.tensor
        self.decode = DecodeWorker(self.decode_engine, self.peers, deployment.decode)

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

    def close(self) -> None:
        self.server.close()
        self.peers.close()
        self.context.term()

    def assert_empty(self) -> None:
        for blocks in (self.prefill.cache or self.prefill_engine.blocks, self.decode_engine.blocks):
            blocks.check_integrity()
        free = (
            (self.prefill.cache or self.prefill_engine.blocks).num_free_blocks,
            self.decode_engine.blocks.num_free_blocks,
        )
        assert free == (self.prefill_engine.pool.num_blocks, self.decode_engine.pool.num_blocks)
        assert self.decode.blocks.host.num_free_blocks == self.decode.num_host_blocks


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
        if isinstance(event, PrefillAnswer | LocalPrefilled):
            for result in event.results:
                tokens.setdefault(result.request_id, []).append(result.token_id)
        if isinstance(event, StepTokens):
            for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                tokens.setdefault(request_id, []).append(token_id)
    return tokens


def released_in(events: list[WorkerEvent]) -> list[int]:
    return [request_id for event in events if isinstance(event, Released) for request_id in event.request_ids]
