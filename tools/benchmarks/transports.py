"""Measures how fast a prompt's KV goes from one process to another by each transport, between equal and unequal ranks.

    python -m tools.benchmarks.transports --source cuda:0 --target cuda:1 --output docs/results/transports.json

A process serves the pools of a source's ranks, one or two, as workers do; this one attaches them as a reader of one
rank does, and pulls the blocks of 512 tokens of LLaMA-2-13B, scattered over both pools. The ceiling is a contiguous
copy of as many bytes from the source's device, or the slower of those to and from page-locked host memory. Two rows say
what NCCL (between CPUs gloo) gives when nothing but its sends and receives is done, one after the other. On CPUs the KV
is small.
"""

import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, get_args

import torch
import typer
import zmq

from ensemble.cache.block_copier import Copy, wait_for_any
from ensemble.cache.host_memory import host_memory
from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.config import TransferConfig, Transport
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.peer_server import PeerServer, rank_address
from ensemble.replicas.peers import Peers
from ensemble.transfer import nccl
from ensemble.transfer.leases import Leases
from ensemble.transfer.packing import make_link_copier
from ensemble.transfer.pair import join, meet
from ensemble.transfer.puller import Pull, Puller
from tools.benchmarks.results import report

LAYOUTS = {  # of the whole model; 512 tokens are 8 and 32 blocks
    "cuda": (KVLayout(40, 40, 64, 128, torch.float16), 8),
    "cpu": (KVLayout(8, 8, 16, 64, torch.float16), 32),
}
GOALS = {("nccl", 1): 0.75, ("nccl", 2): 0.6, ("host", 1): 0.8}
TRANSPORTS: tuple[Transport, ...] = tuple(each for each in get_args(Transport) if each != "auto")
REQUEST_ID, REPEATS, ALONE_REPEATS = 1, 15, 10
START_S, ATTACH_S, PULL_S = 120.0, 60.0, 60.0


def rank_layouts(device: torch.device, num_ranks: int) -> list[PoolLayout]:
    """Of ranks that share the heads."""
    layout, num_blocks = LAYOUTS[device.type]
    heads = layout.num_kv_heads // num_ranks
    return [
        PoolLayout(
            model="benchmark",
            dtype="float16",
            block_size=layout.block_size,
            head_dim=layout.head_dim,
            layers=(0, layout.num_layers),
            kv_heads=tuple(range(rank * heads, (rank + 1) * heads)),
            num_blocks=3 * num_blocks,
        )
        for rank in range(num_ranks)
    ]


def make_pool(layout: PoolLayout, device: torch.device) -> KVPool:
    shape = KVLayout(layout.num_layers, len(layout.kv_heads), layout.block_size, layout.head_dim, torch.float16)
    return KVPool(shape, layout.num_blocks, device)


def pattern(layout: PoolLayout, device: torch.device) -> torch.Tensor:
    """[num_blocks, num_layers, 1, num_kv_heads, 1, 1]: what a pool is filled with."""
    blocks = torch.arange(layout.num_blocks, device=device).view(-1, 1, 1, 1, 1, 1)
    layers = torch.arange(*layout.layers, device=device).view(1, -1, 1, 1, 1, 1)
    heads = torch.tensor(layout.kv_heads, device=device).view(1, 1, 1, -1, 1, 1)
    return ((blocks * 61 + layers * 7 + heads) % 1999).half()


def serve(run_dir: Path, devices: Sequence[torch.device]) -> None:
    layouts = rank_layouts(devices[0], len(devices))
    addresses = [rank_address(f"ipc://{run_dir}/source", rank) for rank in range(len(devices))]
    leases = Leases()
    leases.grant(REQUEST_ID, list(range(layouts[0].num_blocks)))
    for address, layout, device in zip(addresses, layouts, devices, strict=True):
        pool = make_pool(layout, device)
        pool.tensor.copy_(pattern(layout, device))
        PeerServer(zmq.Context(), address, pool, layout, rank_addresses=addresses, leases=leases)
    print("ready", flush=True)
    sys.stdin.read()


@contextmanager
def source_ranks(*devices: str) -> Iterator[str]:
    """The address of a source in another process, with a rank on each device. Raises TimeoutError."""
    with tempfile.TemporaryDirectory() as run_dir, other_process("--serve", run_dir, *devices) as process:
        if read_line(process) != "ready":
            raise RuntimeError(f"the source on {', '.join(devices)} ended")
        yield f"ipc://{run_dir}/source"


@contextmanager
def other_process(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """This program in another process, until it is left."""
    command = [sys.executable, "-m", "tools.benchmarks.transports", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: "subprocess.Popen[bytes]") -> str:
    """Raises TimeoutError."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_S)[0]:
        raise TimeoutError(f"process {process.pid} said nothing within {START_S:g} s")
    return process.stdout.readline().decode().strip()


class Reader:
    """One rank, with the whole model's layers and its share of the heads."""

    def __init__(self, device: torch.device, transport: Transport, rank: int = 0, num_ranks: int = 1) -> None:
        self.layout = rank_layouts(device, num_ranks)[rank]
        self.pool = make_pool(self.layout, device)
        self.expected = pattern(self.layout, device)
        self.context = zmq.Context()
        config = TransferConfig(transport=transport)
        self.peers = Peers(self.context, self.pool.tensor, self.layout, config, rank=rank)
        self.puller = Puller(self.pool.tensor)

    def attach(self, address: str) -> str | None:
        """None, or why not."""
        with torch.cuda.device_of(self.pool.tensor):
            self.peers.attach(address)
            deadline = time.monotonic() + ATTACH_S
            while not (received := self.peers.receive_handles()):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{address} did not answer within {ATTACH_S:g} s")
                zmq.select(self.peers.attaching, [], [], 1.0)
        return received[0][1]

    def prepared(self, address: str, num_blocks: int) -> Pull:
        """Of blocks at random into an empty pool."""
        source_ids, target_ids = (random.sample(range(self.layout.num_blocks), num_blocks) for _ in range(2))
        self.pool.tensor.zero_()
        synchronize(self.pool.tensor)
        source = self.peers.source(address)
        assert source is not None
        return Pull(REQUEST_ID, source, source_ids, target_ids)

    def run(self, pull: Pull) -> None:
        """Raises TransferError or TimeoutError."""
        with torch.cuda.device_of(self.pool.tensor):
            self.puller.start(pull)
        deadline = time.monotonic() + PULL_S
        while not (done := self.puller.completed()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"a pull did not end within {PULL_S:g} s")
            self.puller.wait(1.0)
        if done[0].error is not None:
            raise done[0].error

    def check(self, pull: Pull) -> None:
        """Raises RuntimeError for wrong bytes."""
        if bool((self.pool.tensor[pull.target_block_ids] != self.expected[pull.source_block_ids]).any()):
            raise RuntimeError("pulled blocks differ from their source")

    def timed(self, address: str, num_blocks: int) -> float:
        """Seconds of a pull from its start to its end, as this process sees it."""
        pull = self.prepared(address, num_blocks)
        start = time.perf_counter()
        self.run(pull)
        seconds = time.perf_counter() - start
        self.check(pull)
        return seconds

    def close(self) -> None:
        self.peers.close()
        self.context.term()


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second, of a contiguous copy."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        for each in (source, target):
            synchronize(each)
        times.append(time.perf_counter() - start)
    return source.nbytes / median(times)


def contiguous_rate(source: torch.device, target: torch.device) -> float:
    """Bytes a second, of a copy of as many bytes as a pull brings."""
    layout, num_blocks = LAYOUTS[target.type]
    size = num_blocks * layout.block_bytes
    return copy_rate(*(torch.zeros(size, dtype=torch.uint8, device=device) for device in (source, target)))


def ceilings(source: torch.device, target: torch.device, num_bytes: int) -> dict[str, float]:
    """Transport |-> bytes a second that it cannot pass."""
    peer = contiguous_rate(source, target)
    there, here = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for device in (source, target))
    host = host_memory(num_bytes, target)
    return {"cuda_ipc": peer, "nccl": peer, "host": min(copy_rate(there, host), copy_rate(host, here))}


def pulled(seconds: float, num_bytes: int, ceiling: float) -> dict[str, Any]:
    """Value and unit of a row; `ceiling`: bytes a second."""
    return {
        "value": round(num_bytes / seconds / ceiling, 3),
        "unit": "of the ceiling",
        "pull_GBps": round(num_bytes / seconds / 1e9, 2),
        "ceiling_GBps": round(ceiling / 1e9, 2),
        "pull_ms": round(seconds * 1e3, 2),
    }


def send_alone(device: torch.device, num_bytes: int) -> None:
    """For each line that comes, a number: says that it will, and sends so many bytes that often."""
    copier = make_link_copier(device)
    meeting = meet(device, copier, ATTACH_S, lambda: False)
    print(meeting.rendezvous.hex(), flush=True)
    pair = meeting.wait()
    run = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    synchronize(run)
    for line in sys.stdin:
        print("sending", flush=True)  # before: the first send makes connections, and waits for the other side
        wait_for_all([pair.send([run]) for _ in range(int(line))])


def wait_for_all(copies: list[Copy]) -> None:
    for copy in copies:
        while not copy.is_done():
            wait_for_any([copy], 1.0)
        copy.seconds()


def alone_row(source: str, target: torch.device, num_pieces: int) -> dict[str, Any]:
    """The pair's own rate, of a KV in so many pieces: launching the first is but a small part of it."""
    layout, num_blocks = LAYOUTS[target.type]
    piece_bytes = num_blocks * layout.block_bytes // num_pieces
    ceiling = contiguous_rate(torch.device(source), target)
    with other_process("--send", source, str(piece_bytes)) as process:
        copier = make_link_copier(target)
        pair = join(bytes.fromhex(read_line(process)), target, copier, ATTACH_S, lambda: False)
        run = torch.zeros(piece_bytes, dtype=torch.uint8, device=target)
        synchronize(run)
        assert process.stdin is not None
        for number in (num_pieces, ALONE_REPEATS * num_pieces):  # the first makes connections
            process.stdin.write(f"{number}\n".encode())
            process.stdin.flush()
            assert read_line(process) == "sending"
            start = time.perf_counter()
            wait_for_all([pair.receive([run]) for _ in range(number)])
            seconds = time.perf_counter() - start
        if not bool((run == 1).all()):
            raise RuntimeError("received bytes differ from those that were sent")
        pair.end()
    num_bytes = num_pieces * piece_bytes
    name = f"nccl alone: {num_bytes >> 20} MiB in {num_pieces} pieces"
    return {"name": name, **pulled(seconds / ALONE_REPEATS, num_bytes, ceiling)}


def rows_of(
    source: str,
    target: torch.device,
    num_ranks: int,
    transports: Sequence[Transport] = TRANSPORTS,
) -> Iterator[dict[str, Any]]:
    layout, num_blocks = LAYOUTS[target.type]
    num_bytes = num_blocks * layout.block_bytes
    limits = ceilings(torch.device(source), target, num_bytes)
    ranks = "equal ranks" if num_ranks == 1 else f"{num_ranks} ranks to one"
    with source_ranks(*[source] * num_ranks) as address:
        for transport in transports:
            reader = Reader(target, transport)
            name = f"{transport}, {ranks}: {num_bytes >> 20} MiB in {num_blocks} scattered blocks"
            reason = reader.attach(address)
            goal = GOALS.get((transport, num_ranks)) if target.type == "cuda" else None
            if reason is not None:
                missed = None if goal is None else False
                yield {"name": name, "value": reason, "unit": "", "goal": goal, "met": missed}
            else:
                reader.timed(address, num_blocks)
                seconds = median(reader.timed(address, num_blocks) for _ in range(REPEATS))
                row = {"name": name, **pulled(seconds, num_bytes, limits[transport])}
                yield row | {"goal": goal, "met": None if goal is None else row["value"] >= goal}
            reader.close()


def main(
    source: Annotated[str, typer.Option(help="device of the source's ranks")] = "cuda:0",
    target: Annotated[str, typer.Option(help="device of the reader")] = "cuda:1",
    transport: Annotated[Transport | None, typer.Option(help="the only one; none: all")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Exit status 1 if a goal is missed."""
    random.seed(0)
    if target != "cpu":
        torch.cuda.set_device(torch.device(target))
        print(f"NCCL {nccl.version()}")
    transports = TRANSPORTS if transport is None else (transport,)
    rows = [alone_row(source, torch.device(target), number) for number in ((1, 8) if "nccl" in transports else ())]
    rows += [row for number in (1, 2) for row in rows_of(source, torch.device(target), number, transports)]
    report(rows, output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        run_dir, *devices = sys.argv[2:]
        if devices[0] != "cpu":
            torch.cuda.set_device(torch.device(devices[0]))
        serve(Path(run_dir), [torch.device(device) for device in devices])
    elif sys.argv[1:2] == ["--send"]:
        device, num_bytes = sys.argv[2:]
        if device != "cpu":
            torch.cuda.set_device(torch.device(device))
        send_alone(torch.device(device), int(num_bytes))
    else:
        typer.run(main)
