"""What a running server holds: processes, memory, names in /dev/shm, and what its metrics page says."""

import urllib.request
from pathlib import Path
from typing import Protocol

import psutil

from tools.server.triton_server import TritonServer


def processes(server: TritonServer) -> list[psutil.Process]:
    """The Triton server's with its descendants, and those beside it."""
    own = psutil.Process(server.pid)
    return [*map(psutil.Process, server.beside_pids), own, *own.children(recursive=True)]


def workers(server: TritonServer) -> list[psutil.Process]:
    found = []
    for process in processes(server):
        try:
            if "ensemble.replicas.worker" in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def resident_bytes(server: TritonServer) -> int:
    total = 0
    for process in processes(server):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def shared_memory(server: TritonServer) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"*{server.run_dir.name}*"))


class HasMetrics(Protocol):
    @property
    def metrics_url(self) -> str: ...


class Metrics:
    """The metrics page as it is now."""

    def __init__(self, server: HasMetrics) -> None:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
            lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line and line[0] != "#"]
        self._samples = {name: float(value) for name, value in lines}

    def total(self, name: str, label: str = "") -> float:
        """Sum of the samples of a metric, over all labels or those that hold `label`."""
        return sum(
            value for sample, value in self._samples.items() if sample.startswith(name + "{") and label in sample
        )

    @property
    def blocks_in_use(self) -> float:
        """Of all replicas, by the workers' own count; -1 while no pool is known."""
        num_blocks = self.total("distserve:kv_blocks")
        return num_blocks - self.total("distserve:kv_blocks_free") if num_blocks else -1.0
