"""Ranks of a source and of a reader with real pools and sockets between them, without engines."""

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.config import TransferConfig, Transport
from ensemble.protocol.curve import CurveKey, guard
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.peer_server import PeerServer, rank_address
from ensemble.replicas.peers import Peers
from ensemble.transfer.leases import Leases
from ensemble.transfer.puller import Pull, Puller, Source
from tests.transfer.layouts import BLOCK_SIZE, HEAD_DIM

CPU = torch.device("cpu")
DEVICES = [  # of a source and of its reader
    pytest.param((CPU, CPU), id="cpu"),
    pytest.param((torch.device("cuda", 0), torch.device("cuda", 1)), marks=pytest.mark.multigpu, id="two gpus"),
]
NUM_LAYERS, NUM_KV_HEADS, NUM_BLOCKS = 7, 12, 8
WAIT_S = 20.0


def whole_model(num_layers: int = NUM_LAYERS, num_kv_heads: int = NUM_KV_HEADS) -> torch.Tensor:
    """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], no number twice, and none 0."""
    shape = (NUM_BLOCKS, num_layers, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def part_of(model: torch.Tensor, layout: PoolLayout) -> torch.Tensor:
    return model[:, slice(*layout.layers)][:, :, :, list(layout.kv_heads)]


def make_pool(layout: PoolLayout, device: torch.device = CPU) -> KVPool:
    shape = KVLayout(layout.num_layers, len(layout.kv_heads), BLOCK_SIZE, HEAD_DIM, torch.float32)
    return KVPool(shape, layout.num_blocks, device)


class SourceRanks:
    """A server a rank, each with its part of `whole_model`."""

    def __init__(
        self, layouts: list[PoolLayout], run_dir: Path, address: str = "", device: torch.device = CPU, **settings: Any
    ) -> None:
        self.address = address or f"ipc://{run_dir}/source"
        addresses = [rank_address(self.address, rank) for rank in range(len(layouts))]
        self.pools = [make_pool(layout, device) for layout in layouts]
        model = whole_model(num_kv_heads=1 + max(max(layout.kv_heads) for layout in layouts))
        self.contexts = [zmq.Context() for _ in layouts]
        self.leases = Leases()
        self.servers = []
        for context in self.contexts:
            guard(context, settings.get("key"))
        for layout, pool, context, address in zip(layouts, self.pools, self.contexts, addresses, strict=True):
            pool.tensor.copy_(part_of(model, layout))
            self.servers.append(
                PeerServer(context, address, pool, layout, rank_addresses=addresses, leases=self.leases, **settings)
            )

    def close(self) -> None:
        for server, context in zip(self.servers, self.contexts, strict=True):
            server.close()
            context.term()


class Reader:
    """One reading rank."""

    def __init__(
        self,
        layout: PoolLayout,
        rank: int = 0,
        transport: Transport = "auto",
        timeout_s: float = WAIT_S,
        key: CurveKey | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.layout = layout
        self.pool = make_pool(layout, device)
        self.context = zmq.Context()
        config = TransferConfig(transport=transport, timeout_s=timeout_s)
        self.peers = Peers(self.context, self.pool.tensor, layout, config, rank=rank, key=key)
        self.puller = Puller(self.pool.tensor)

    def fill(self, value: float) -> None:
        """The whole pool, before anything that comes later."""
        self.pool.tensor.fill_(value)
        if self.pool.tensor.is_cuda:
            torch.cuda.synchronize(self.pool.tensor.device)

    def attach(self, address: str) -> list[tuple[str, str | None]]:
        self.peers.attach(address)
        received: list[tuple[str, str | None]] = []
        deadline = time.monotonic() + WAIT_S
        while not received:
            assert time.monotonic() < deadline
            zmq.select(self.peers.attaching, [], [], 1.0)
            received = self.peers.receive_handles()
        return received

    def pull(self, address: str, source_ids: list[int], target_ids: list[int], request_id: int = 0) -> Pull:
        source = self.peers.source(address)
        assert source is not None
        return self.pulled_of(source, source_ids, target_ids, request_id)

    def pulled_of(self, source: Source, source_ids: list[int], target_ids: list[int], request_id: int) -> Pull:
        self.puller.start(Pull(request_id, source, source_ids, target_ids))
        deadline = time.monotonic() + WAIT_S
        while not (done := self.puller.completed()):
            assert time.monotonic() < deadline
            self.puller.wait(1.0)
        [pull] = done
        return pull

    def expected(self, num_kv_heads: int, source_ids: list[int], target_ids: list[int]) -> torch.Tensor:
        """The pool after that pull into an empty one."""
        expected = torch.zeros_like(self.pool.tensor)
        expected[target_ids] = part_of(whole_model(num_kv_heads=num_kv_heads), self.layout)[source_ids].to(
            expected.device
        )
        return expected

    def close(self) -> None:
        self.peers.close()
        self.context.term()


def changed(layout: PoolLayout, **fields: object) -> PoolLayout:
    return msgspec.structs.replace(layout, **fields)
