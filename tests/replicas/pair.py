"""Two replicas in one process, with real engines, sockets between them, and what their events say."""

from dataclasses import replace
from pathlib import Path

import torch
import zmq

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment, StageName
from ensemble.engine.engine import load_engine
from ensemble.models.fingerprint import fingerprint
from ensemble.protocol.router_replica import (
    Arrival,
    Command,
    Event,
    Join,
    KVHandoff,
    LeasePrefix,
    PrefixLeased,
    PrefixPulled,
    PromptChunk,
    PullPrefix,
    Released,
    RunPrompts,
    StepDone,
    SwapReport,
)
from ensemble.replicas.loop import EngineLoop
from ensemble.replicas.loop_settings import loop_settings
from ensemble.replicas.peer_server import PeerServer, pool_layout
from ensemble.replicas.peers import Peer, Peers
from ensemble.request import Request
from ensemble.transfer.puller import mapped_source

CPU = torch.device("cpu")


class Replica:
    """An engine loop, and its sockets to peers."""

    def __init__(self, deployment: Deployment, home: StageName, address: str, device: torch.device = CPU) -> None:
        self.engine = load_engine(deployment, deployment.stage(home), device)
        self.address = address
        self.context = zmq.Context()
        layout = pool_layout(self.engine, fingerprint(self.engine.spec, deployment.model))
        self.peers = Peers(self.context, self.engine.pool.tensor, layout, deployment.transfer)
        self.loop = EngineLoop(self.engine, self.peers, loop_settings(deployment, home), address)
        self.server = PeerServer(self.context, address, self.engine.pool, layout, leases=self.loop.leases)

    def handle(self, command: Command) -> list[Event]:
        return self.loop.handle(command)

    def serve_once(self) -> list[Event]:
        """What peers have said, and a step if there is something to do."""
        events = self.loop.end_leases(self.server.acknowledged())
        if self.peers.attaching:
            events += self.loop.receive_handles()
        return events + (self.loop.step() if self.loop.has_work else [])

    def run(self) -> list[Event]:
        """Until there is nothing to do."""
        events: list[Event] = []
        while self.loop.has_work or self.peers.attaching:
            events += self.serve_once()
        return events

    def acknowledged(self) -> list[Event]:
        """Leases that end, after waiting for one."""
        self.server.socket.poll(1000)
        return self.loop.end_leases(self.server.acknowledged())

    def check_integrity(self) -> None:
        self.loop.blocks.check_integrity()
        self.loop._running.check_integrity()

    def assert_empty(self) -> None:
        self.check_integrity()
        assert self.loop.is_empty
        assert self.loop.num_free_blocks == self.engine.pool.num_blocks
        assert self.loop.blocks.host.num_free_blocks == self.loop.num_host_blocks

    def close(self) -> None:
        self.server.close()
        self.peers.close()
        self.context.term()


class Pair:
    """One replica for prompts and one for sequences."""

    def __init__(self, deployment: Deployment, run_dir: Path, device: torch.device = CPU) -> None:
        self.prefill = Replica(deployment, "prefill", f"ipc://{run_dir}/prefill", device)
        self.decode = Replica(deployment, "decode", f"ipc://{run_dir}/decode", device)
        if device.type == "cuda":  # CUDA opens no handle of the process that made it
            for reader, source in ((self.prefill, self.decode), (self.decode, self.prefill)):
                mapped = replace(mapped_source(source.engine.pool.tensor), address=source.address)
                reader.peers._peers[source.address] = Peer([reader.peers._ask(source.address)], source=mapped)

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()

    def assert_empty(self) -> None:
        self.prefill.assert_empty()
        self.decode.assert_empty()


def whole_prompts(requests: list[Request], *, batch_id: int = 0, stays: bool = False) -> RunPrompts:
    return RunPrompts(
        batch_id=batch_id,
        chunks=[
            PromptChunk(request_id=each.request_id, end=each.prefill_len, request=each, stays=stays)
            for each in requests
        ],
    )


def fetch_prefix(pair: Pair, lease_id: int, token_ids: list[int]) -> list[Event]:
    """What the router asks of the two, so that the one for prompts has what of them is cached at the other one."""
    block_size = pair.decode.engine.pool.layout.block_size
    hashes = block_hashes(token_ids, block_size)
    (leased,) = pair.decode.handle(LeasePrefix(lease_id=lease_id, hashes=hashes))
    assert isinstance(leased, PrefixLeased)
    num_blocks = len(leased.handoff.block_ids)
    assert leased.handoff.num_kv_tokens == num_blocks * block_size
    if not num_blocks:
        return []
    return pair.prefill.handle(PullPrefix(handoff=leased.handoff, hashes=hashes[:num_blocks]))


def fetched_in(events: list[Event]) -> list[PrefixPulled]:
    return [event for event in events if isinstance(event, PrefixPulled)]


def handoffs_of(events: list[Event]) -> dict[int, KVHandoff]:
    """request_id |-> its hand-off."""
    return {
        handoff.request_id: handoff for event in events if isinstance(event, StepDone) for handoff in event.handoffs
    }


def join(events: list[Event], requests: list[Request]) -> Join:
    """Those of the requests that are handed off in the events go on, with the tokens that they have by them."""
    handoffs, tokens = handoffs_of(events), tokens_of(events)
    return Join(
        arrivals=[
            Arrival(
                request=request,
                output_token_ids=request.resumed_token_ids + tokens[request.request_id],
                handoff=handoffs[request.request_id],
            )
            for request in requests
            if request.request_id in handoffs
        ]
    )


def tokens_of(events: list[Event]) -> dict[int, list[int]]:
    """request_id |-> tokens of its output, the first of them wherever it began. Fails if one is missing or repeated."""
    tokens: dict[int, list[int]] = {}
    next_position: dict[int, int] = {}
    for event in events:
        if isinstance(event, StepDone):
            for request_id, position, token_id in zip(event.request_ids, event.positions, event.token_ids, strict=True):
                assert position == next_position.get(request_id, position)
                next_position[request_id] = position + 1
                tokens.setdefault(request_id, []).append(token_id)
    return tokens


def released_in(events: list[Event]) -> list[int]:
    return [request_id for event in events if isinstance(event, Released) for request_id in event.request_ids]


def swaps_in(events: list[Event]) -> list[SwapReport]:
    return [event for event in events if isinstance(event, SwapReport)]
