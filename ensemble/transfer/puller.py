"""Pulls KV blocks out of peers' pools, beside the engine: a side stream on a GPU, a thread on a CPU.

Only when a copy has completed, never when it was merely enqueued, does `completed()` return it: the acknowledgement
that follows lets the source reuse its blocks.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.block_copy import copy_blocks


@dataclass(slots=True, eq=False)
class Pull:
    """One hand-off's copy: peer block source_block_ids[i] |-> local block target_block_ids[i]."""

    request_id: int
    source_pool: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], a peer's mapping
    source_block_ids: list[int]
    target_block_ids: list[int]
    seconds: float = 0.0  # time of the copy itself, set on completion

    @property
    def num_bytes(self) -> int:
        return len(self.source_block_ids) * self.source_pool[0].nbytes


class Puller(Protocol):
    def start(self, pull: Pull) -> None: ...

    def completed(self) -> list[Pull]:
        """Pulls whose copies have completed since the last call, in the order of their start."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Waits until the oldest pull has completed, at most `timeout_s`."""
        ...

    @property
    def num_in_flight(self) -> int: ...


def make_puller(pool: torch.Tensor) -> Puller:
    return CudaPuller(pool) if pool.is_cuda else ThreadPuller(pool)


class ThreadPuller:
    """Copies on one thread; torch releases the GIL while it copies."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-pull")
        self._in_flight: deque[tuple[Pull, Future[float]]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, pull: Pull) -> None:
        self._in_flight.append((pull, self._thread.submit(self._copy, pull)))

    def _copy(self, pull: Pull) -> float:
        start = time.perf_counter()
        source_ids = torch.tensor(pull.source_block_ids, dtype=torch.int64)
        target_ids = torch.tensor(pull.target_block_ids, dtype=torch.int64)
        copy_blocks(pull.source_pool, self._pool, source_ids, target_ids)
        return time.perf_counter() - start

    def completed(self) -> list[Pull]:
        done = []
        while self._in_flight and self._in_flight[0][1].done():
            pull, future = self._in_flight.popleft()
            pull.seconds = future.result()
            done.append(pull)
        return done

    def wait(self, timeout_s: float) -> None:
        if self._in_flight:
            wait([self._in_flight[0][1]], timeout_s)


class CudaPuller:
    """One gather kernel a pull, for all blocks and layers, on a stream of its own."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device)
        self._in_flight: deque[tuple[Pull, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, pull: Pull) -> None:
        ids = torch.tensor([pull.source_block_ids, pull.target_block_ids], dtype=torch.int64).pin_memory()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            on_device = ids.to(self._pool.device, non_blocking=True)
            began.record()
            copy_blocks(pull.source_pool, self._pool, on_device[0], on_device[1])
            ended.record()
        self._in_flight.append((pull, began, ended))

    def completed(self) -> list[Pull]:
        done = []
        while self._in_flight and self._in_flight[0][2].query():
            pull, began, ended = self._in_flight.popleft()
            pull.seconds = began.elapsed_time(ended) / 1e3
            done.append(pull)
        return done

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._in_flight and not self._in_flight[0][2].query() and time.monotonic() < deadline:
            time.sleep(20e-6)
