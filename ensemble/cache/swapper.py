"""Moves KV blocks between device and host pool, beside the engine.

    out: device blocks |-> host blocks, after the steps launched before it, which wrote the blocks
    in:  host blocks |-> device blocks, which nothing that is under way uses

Only a copy that has completed, never one that was merely enqueued, is returned by `completed()`; until then neither
side's blocks may be reused, and a sequence that comes in may not run.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ensemble.cache.block_copier import Copy, make_copier, together, wait_for_any
from ensemble.cache.block_manager import Swap
from ensemble.cache.host_memory import host_memory
from ensemble.cache.kv_pool import KVLayout
from ensemble.errors import ConfigError

Way: TypeAlias = Literal["out", "in"]

# Smaller pieces would cost the copy engine more for a call than for its bytes. tools.benchmarks.swap measures both.
COPY_ENGINE_RUN_BYTES = 2 << 20


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
        memory = host_memory(num_blocks * layout.block_bytes, device)
        return memory.view(layout.dtype).view(num_blocks, *layout.block_shape)
    except (RuntimeError, MemoryError, OSError) as error:
        num_bytes = num_blocks * layout.block_bytes
        raise ConfigError(f"host_kv_bytes: the host has no {num_bytes >> 20} MiB for the KV pool: {error}") from None


class Swapper:
    """The copies between two pools, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def __init__(
        self,
        device_pool: torch.Tensor,
        host_pool: torch.Tensor,
        start_elsewhere: Callable[[Swap, Way], Copy] | None = None,  # between the pools of the replica's other ranks
    ) -> None:
        self._pools: dict[Way, tuple[torch.Tensor, torch.Tensor]] = {  # source, target
            "out": (device_pool, host_pool),
            "in": (host_pool, device_pool),
        }
        self._start_elsewhere = start_elsewhere
        self._copiers = {way: make_copier(device_pool.device, COPY_ENGINE_RUN_BYTES) for way in self._pools}
        self._in_flight: dict[Way, deque[tuple[Swap, Copy]]] = {"out": deque(), "in": deque()}
        self._in_blocks, self._in_seconds = 0, 0.0

    @property
    def num_in_flight(self) -> int:
        return sum(map(len, self._in_flight.values()))

    def start(self, swap: Swap, way: Way) -> None:
        """Starts a copy, after those of the same way."""
        elsewhere = [] if self._start_elsewhere is None else [self._start_elsewhere(swap, way)]
        copy = self._copiers[way].start(
            *self._pools[way],
            swap.source_block_ids,
            swap.destination_block_ids,
            after_steps=way == "out",  # those launched by now write the blocks
        )
        self._in_flight[way].append((swap, together(copy, *elsewhere)))

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
        wait_for_any([in_flight[0][1] for in_flight in self._in_flight.values() if in_flight], timeout_s)

    def swap_in_s(self, num_blocks: int) -> float:
        """What bringing in so many blocks has cost on average; 0 before any came in."""
        return num_blocks * self._in_seconds / self._in_blocks if self._in_blocks else 0.0
