"""Kills the exporter, and then the importer, of a KV pool while a copy out of it is under way, provably.

    python -m tools.proofs.transfer_deaths --source cuda:0 --target cuda:1

Two processes do what a prefill and a decode worker do: one holds a pool and exports it; one maps it, and pulls all its
blocks over and over, by copy engine and by kernel in turn, with several copies in its queue. While that never runs
empty, a copy is under way at every moment, that of the kill and those of the death included. tools.proofs.gpu_base
runs this on GPUs.
"""

import itertools
import json
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer

from ensemble.cache.kv_pool import KVLayout, KVPool, map_peer_pool
from ensemble.protocol.replica_replica import decode_pool_handle, encode
from ensemble.transfer.puller import Pull, Puller, mapped_source
from tools.benchmarks.results import at_most, exactly, report

LAYOUT = KVLayout(num_layers=8, num_kv_heads=8, block_size=64, head_dim=128, dtype=torch.float16)
POOL_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
# Copies that the importer keeps in its queue: on a CPU some tenths of a second, in which it has to get a core.
NUM_AHEAD = {"cpu": 12, "cuda": 4}
NUM_BEFORE, NUM_AFTER = 20, 10  # copies that have completed before a kill, and after a death
TOLERANCE_MIB = 64
ANSWER_S = 60.0
EXPORT, IMPORT = "export", "import"  # what a process of this module is told to be
Row = dict[str, Any]


class Peer:
    """One of the two processes; it answers each line with a line of JSON."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tools.proofs.transfer_deaths", "--peer", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def _stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def heard(self) -> Any:
        line = self._stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait(ANSWER_S)}")
        return json.loads(line)

    def ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self.heard()

    def kill(self) -> float:
        """Returns the seconds until the process has ended."""
        start = time.monotonic()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(ANSWER_S)
        return time.monotonic() - start

    def end(self) -> None:
        """By closing its input; killed if that is not enough, or if it is dead already."""
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def death_rows(source: str, target: str) -> list[Row]:
    return [
        row | {"name": f"{source} to {target}: {row['name']}"}
        for row in (*exporter_dies(source, target), *importer_dies(source, target))
    ]


def exporter_dies(source: str, target: str) -> list[Row]:
    exporter = Peer(EXPORT, source)
    importer = Peer(IMPORT, target, source, exporter.heard())
    try:
        before = copies(importer, NUM_BEFORE)
        gone_s = exporter.kill()
        gone = importer.ask("count")
        after = copies(importer, gone["completed"] + NUM_AFTER)
        left = importer.ask("unmap")
    finally:
        exporter.end()
        importer.end()
    during = gone["completed"] - before["completed"]
    return [
        {"name": "exporter killed: time until it had ended", "value": round(gone_s, 3), "unit": "s"},
        {"name": "exporter killed: copies that completed in that time", "value": during, "unit": "copies"},
        exactly("exporter killed: moments without a copy under way", after["gaps"], "moments", 0),
        exactly("exporter killed: wrong numbers in the importer's own copy and product", left["wrong"], "numbers", 0),
        at_most("exporter killed: memory still mapped by the importer", left["mapped_mib"], "MiB", TOLERANCE_MIB),
        {"name": "exporter killed: wrong numbers in what was copied", "value": left["wrong_copied"], "unit": "numbers"},
    ]


def importer_dies(source: str, target: str) -> list[Row]:
    exporter = Peer(EXPORT, source)
    handle = exporter.heard()
    before = exporter.ask("check")
    importer = Peer(IMPORT, target, source, handle)
    try:
        copied = copies(importer, NUM_BEFORE)
        gone_s = importer.kill()
        after = exporter.ask("check")
        deadline = time.monotonic() + 5.0  # for the driver to take back what a dead process had
        while before["free_mib"] - after["free_mib"] > TOLERANCE_MIB and time.monotonic() < deadline:
            after = exporter.ask("check")
        successor = Peer(IMPORT, target, source, handle)  # of a killed worker: it maps the same pool
        try:
            copies(successor, NUM_AFTER)
            wrong_copied = successor.ask("unmap")["wrong_copied"]
        finally:
            successor.end()
    finally:
        importer.end()
        exporter.end()
    lost_mib = before["free_mib"] - after["free_mib"]
    return [
        {"name": "importer killed: time until it had ended", "value": round(gone_s, 3), "unit": "s"},
        exactly("importer killed: moments without a copy under way", copied["gaps"], "moments", 0),
        exactly("importer killed: wrong numbers in the exporter's pool and product", after["wrong"], "numbers", 0),
        at_most("importer killed: memory that the exporter's device lacks", lost_mib, "MiB", TOLERANCE_MIB),
        exactly("importer killed: wrong numbers in its successor's copies", wrong_copied, "numbers", 0),
    ]


def copies(importer: Peer, at_least_completed: int) -> dict[str, int]:
    """Waits until so many copies have completed; what the importer says of them then."""
    while (said := importer.ask("count"))["completed"] < at_least_completed:
        time.sleep(0.005)
    return dict(said)


# ---- the two processes


def export(device: torch.device) -> None:
    pool = KVPool(LAYOUT, POOL_BYTES[device.type] // LAYOUT.block_bytes, device)
    fill(pool.tensor)
    synchronize(device)
    tell(encode(pool.export()).hex())
    for _ in sys.stdin:
        tell({"wrong": num_wrong(pool.tensor) + wrong_products(device), "free_mib": free_mib(device)})


def import_(device: torch.device, source: torch.device, handle: str) -> None:
    own = KVPool(LAYOUT, POOL_BYTES[device.type] // LAYOUT.block_bytes, device)
    free_before, pool_mib = free_mib(source), own.tensor.nbytes >> 20
    mappings_before = num_mappings()
    peer = map_peer_pool(decode_pool_handle(bytes.fromhex(handle)), device)
    puller, blocks = Puller(own.tensor), range(own.num_blocks)
    orders = itertools.cycle([list(blocks), random.sample(blocks, len(blocks))])  # by copy engine and by kernel
    num_completed = num_gaps = 0
    while True:
        num_gaps += num_completed > 0 and puller.num_in_flight == 0
        while puller.num_in_flight < NUM_AHEAD[device.type]:
            block_ids = next(orders)
            puller.start(Pull(0, mapped_source(peer), block_ids, block_ids))
        puller.wait(ANSWER_S)
        num_completed += len(puller.completed())
        if select.select([sys.stdin], [], [], 0)[0]:
            if sys.stdin.readline() != "count\n":
                break
            tell({"completed": num_completed, "gaps": num_gaps})
    while puller.num_in_flight:
        puller.wait(ANSWER_S)
        puller.completed()
    wrong_copied = num_wrong(own.tensor)
    del peer
    fill(own.tensor)
    wrong = num_wrong(own.tensor) + wrong_products(device)
    if device.type == "cuda":
        mapped_mib = max(0, pool_mib - (free_mib(source) - free_before))
    else:
        mapped_mib = (num_mappings() - mappings_before) * pool_mib
    tell({"wrong": wrong, "wrong_copied": wrong_copied, "mapped_mib": mapped_mib})


def fill(pool: torch.Tensor) -> None:
    """Every block with a number of its own."""
    pool.copy_(pattern(pool))


def num_wrong(pool: torch.Tensor) -> int:
    return int((pool != pattern(pool)).sum())


def pattern(pool: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(1, len(pool) + 1, device=pool.device) % 1000
    return numbers.to(pool.dtype).view(-1, *[1] * (pool.ndim - 1))


def wrong_products(device: torch.device) -> int:
    """Whether the device still computes: of a product with the unit matrix."""
    numbers = torch.arange(256.0 * 256, device=device).view(256, 256)
    return int((numbers @ torch.eye(256, device=device) != numbers).sum())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_mib(device: torch.device) -> int:
    """Of a GPU, what neither another process nor a mapping has; 0 of a CPU."""
    if device.type != "cuda":
        return 0
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) >> 20


def num_mappings() -> int:
    """Of CPU pools, own and peers', in this process."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("distserve-kv-pool")


def tell(what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(
    source: Annotated[str, typer.Option(help="device of the exporting process")] = "cpu",
    target: Annotated[str, typer.Option(help="device of the importing process")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Exit status 1 if a goal is missed."""
    report(death_rows(source, target), output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        role, own_device, *rest = sys.argv[2:]
        if own_device != "cpu":
            torch.cuda.set_device(torch.device(own_device))
        if role == EXPORT:
            export(torch.device(own_device))
        else:
            import_(torch.device(own_device), torch.device(rest[0]), rest[1])
    else:
        typer.run(main)
