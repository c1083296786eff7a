"""Pulls KV blocks out of peers' pools, beside the engine.

Only when a copy has completed, never when it was merely enqueued, does `completed()` return it: the acknowledgement
that follows lets the source reuse its blocks.
"""

from collections import deque
from dataclasses import dataclass

import torch

from ensemble.cache.block_copier import Copy, make_copier, wait_for_any

# Over NVLink the copy engine takes 3.6 us for a call beside its bytes, the time of 1.4 MB: pieces of 16 MiB and more
# reach the kernel's 0.93 of the rate of one contiguous copy, and larger ones pass it (tools.benchmarks.transfer).
COPY_ENGINE_RUN_BYTES = 16 << 20


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


class Puller:
    """Copies into `pool`, a decode worker's, one pull after the other."""

    def __init__(self, pool: torch.Tensor, copy_engine_run_bytes: int = COPY_ENGINE_RUN_BYTES) -> None:
        self._pool = pool
        self._copier = make_copier(pool.device, copy_engine_run_bytes)
        self._in_flight: deque[tuple[Pull, Copy]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, pull: Pull) -> None:
        copy = self._copier.start(pull.source_pool, self._pool, pull.source_block_ids, pull.target_block_ids)
        self._in_flight.append((pull, copy))

    def completed(self) -> list[Pull]:
        """Pulls whose copies have completed since the last call, in the order of their start."""
        done = []
        while self._in_flight and self._in_flight[0][1].is_done():
            pull, copy = self._in_flight.popleft()
            pull.seconds = copy.seconds()
            done.append(pull)
        return done

    def wait(self, timeout_s: float) -> None:
        """Waits until the oldest pull has completed, at most `timeout_s`."""
        wait_for_any([copy for _, copy in list(self._in_flight)[:1]], timeout_s)
