"""Moves KV blocks between device and host pool, beside the engine: on side streams on a GPU, on threads on a CPU.

    out: device blocks |-> host blocks, after the steps launched before it, which wrote the blocks
    in:  host blocks |-> device blocks, which nothing that is under way uses

Only a copy that has completed, never one that was merely enqueued, is returned by `completed()`; until then neither
side's blocks may be reused, and a sequence that comes in may not run.
"""

import mmap
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ensemble.cache.kv_pool import KVLayout
from ensemble.errors import ConfigError
from ensemble.scheduling.preemptive_decode import Swap
from kernels.block_copy import copy_blocks

Way: TypeAlias = Literal["out", "in"]

# Blocks of this size and more are copied by the copy engine, which leaves the multiprocessors to the engine's steps;
# smaller ones by a kernel, because a call for each would cost more than its bytes. tools.bench_swap measures both.
COPY_ENGINE_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Swapped:
    """A completed copy."""

    request_id: int
    way: Way
    num_blocks: int
    seconds: float  # of the copy itself


def make_host_pool(layout: KVLayout, num_blocks: int, device: torch.device) -> torch.Tensor:
    """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] on the host, page-locked for a GPU.

    Raises ConfigError if the host has no memory for it.
    """
    try:
        if device.type == "cpu" or not num_blocks:
            return torch.empty((num_blocks, *layout.block_shape), dtype=layout.dtype)
        # Not `pin_memory=True`, which takes the next power of two of bytes. Pages of its own, so that nothing else
        # comes to lie in what is registered.
        memory = _RegisteredMemory(-1, num_blocks * layout.block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pool = torch.frombuffer(memory, dtype=layout.dtype).view(num_blocks, *layout.block_shape)
        memory.register(pool)
        return pool
    except (RuntimeError, MemoryError, OSError) as error:
        num_bytes = num_blocks * layout.block_bytes
        raise ConfigError(f"host_kv_bytes: the host has no {num_bytes >> 20} MiB for the KV pool: {error}") from None


class _RegisteredMemory(mmap.mmap):
    """Page-locked until just before it is unmapped."""

    address: int | None = None

    def register(self, pool: torch.Tensor) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pool.data_ptr(), pool.nbytes, 0))
        self.address = pool.data_ptr()

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.address)


class Swapper:
    """The copies between two pools, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def __init__(self, device_pool: torch.Tensor, host_pool: torch.Tensor) -> None:
        make_copier = _StreamCopier if device_pool.is_cuda else _ThreadCopier
        self._copiers: dict[Way, _StreamCopier | _ThreadCopier] = {
            "out": make_copier(device_pool, host_pool),
            "in": make_copier(host_pool, device_pool),
        }
        self._in_flight: dict[Way, deque[tuple[Swap, _Copy]]] = {"out": deque(), "in": deque()}
        self._in_blocks, self._in_seconds = 0, 0.0

    @property
    def num_in_flight(self) -> int:
        return sum(map(len, self._in_flight.values()))

    def start(self, swap: Swap, way: Way) -> None:
        """Starts a copy, after those of the same way."""
        copy = self._copiers[way].start(swap.source_block_ids, swap.destination_block_ids)
        self._in_flight[way].append((swap, copy))

    def completed(self) -> list[Swapped]:
        """Copies that have completed since the last call, those of a way in the order of their start."""
        done = []
        for way, in_flight in self._in_flight.items():
            while in_flight and in_flight[0][1].is_done():
                swap, copy = in_flight.popleft()
                done.append(Swapped(swap.request_id, way, len(swap.source_block_ids), copy.seconds()))
        for swapped in done:
            if swapped.way == "in":
                self._in_blocks += swapped.num_blocks
                self._in_seconds += swapped.seconds
        return done

    def wait(self, timeout_s: float) -> None:
        """Waits until a copy has completed, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        oldest = [in_flight[0][1] for in_flight in self._in_flight.values() if in_flight]
        while oldest and not any(copy.is_done() for copy in oldest) and time.monotonic() < deadline:
            time.sleep(20e-6)

    def swap_in_s(self, num_blocks: int) -> float:
        """What bringing in so many blocks has cost on average; 0 before any came in."""
        return num_blocks * self._in_seconds / self._in_blocks if self._in_blocks else 0.0


@dataclass(frozen=True, slots=True)
class _Copy:
    is_done: Callable[[], bool]
    seconds: Callable[[], float]  # once it is done; raises what the copy raised


class _ThreadCopier:
    """Copies on one thread; torch releases the GIL while it copies."""

    def __init__(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._source, self._destination = source, destination
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-swap")

    def start(self, source_ids: list[int], destination_ids: list[int]) -> _Copy:
        future = self._thread.submit(self._copy, source_ids, destination_ids)
        return _Copy(future.done, future.result)

    def _copy(self, source_ids: list[int], destination_ids: list[int]) -> float:
        start = time.perf_counter()
        copy_blocks(self._source, self._destination, torch.tensor(source_ids), torch.tensor(destination_ids))
        return time.perf_counter() - start


class _StreamCopier:
    """Copies on a stream of its own."""

    def __init__(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._source, self._destination = source, destination
        self._device = source.device if source.is_cuda else destination.device
        self._stream = torch.cuda.Stream(self._device)
        self._by_engine = source.stride(0) * source.itemsize >= COPY_ENGINE_BLOCK_BYTES

    def start(self, source_ids: list[int], destination_ids: list[int]) -> _Copy:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._source.is_cuda:  # the steps launched by now write these blocks
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            began.record()
            copy = copy_runs if self._by_engine else self._copy_by_kernel
            copy(self._source, self._destination, source_ids, destination_ids)
            ended.record()
        return _Copy(ended.query, lambda: began.elapsed_time(ended) / 1e3)

    def _copy_by_kernel(
        self, source: torch.Tensor, destination: torch.Tensor, source_ids: list[int], destination_ids: list[int]
    ) -> None:
        ids = torch.tensor([source_ids, destination_ids]).pin_memory().to(self._device, non_blocking=True)
        copy_blocks(source, destination, ids[0], ids[1])


def copy_runs(
    source: torch.Tensor, destination: torch.Tensor, source_ids: list[int], destination_ids: list[int]
) -> None:
    """destination[destination_ids] = source[source_ids] by the copy engine, a call for each run on both sides."""
    for start, length in _runs(source_ids, destination_ids):
        first, target = source_ids[start], destination_ids[start]
        destination[target : target + length].copy_(source[first : first + length], non_blocking=True)


def _runs(source_ids: list[int], destination_ids: list[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces of the two lists in which both count up by one."""
    start = 0
    for index in range(1, len(source_ids) + 1):
        goes_on = index < len(source_ids) and (
            source_ids[index] == source_ids[index - 1] + 1 and destination_ids[index] == destination_ids[index - 1] + 1
        )
        if not goes_on:
            yield start, index - start
            start = index
