"""A replica in virtual time: the real engine loop over an engine that predicts its steps, and copies that take time.

Its clock runs ahead of the simulation's while it computes, as a worker's thread is away while it waits for its GPU:
what is sent to it meanwhile is read when it is back.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ensemble.cache.block_manager import BlockManager, Swap
from ensemble.cache.kv_pool import KVLayout
from ensemble.cache.swapper import Swapped, Swapper, Way
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, Launched
from ensemble.parallel.group import ALONE
from ensemble.protocol.router_replica import Command, Event, KVHandoff, SwapReport
from ensemble.replicas.loop import EngineLoop
from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.peers import Peers
from ensemble.request import Sequence
from ensemble.scheduling.estimator import StepShape
from ensemble.transfer.puller import Pull, Puller, Source
from tools.simulation.costs import Costs, StepTimes, ToldEstimator
from tools.simulation.noise import draw

LEAST_WAIT_S = 1e-6
POLL_S = 2e-4  # of a worker whose last step runs


@dataclass(slots=True)
class Clock:
    """Of one replica, in seconds of the simulation."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class _Handle:
    end: float
    clock: Clock

    @property
    def is_done(self) -> bool:
        return self.clock.now >= self.end


@dataclass(slots=True)
class _Pool:
    """Of no bytes: a block copied for a prompt that is cached whole takes no time."""

    layout: KVLayout
    num_blocks: int
    tensor: torch.Tensor  # [num_blocks, 1, 1, 1, 1, 1]

    def copy_blocks(self, source_ids: list[int], target_ids: list[int]) -> None:
        pass


class SimulatedEngine:
    """Steps take what `times` says and noise adds, at each place of a pipeline, and every token is 0."""

    def __init__(
        self,
        costs: Costs,
        times: StepTimes,
        estimator: ToldEstimator,
        block_size: int,
        num_blocks: int,
        clock: Clock,
        num_places: int,
        rng: random.Random,
    ) -> None:
        head_dim = -(-costs.kv_token_bytes // 2)  # one layer, one head: only the bytes of a block matter
        layout = KVLayout(1, 1, block_size, head_dim, torch.int8)
        self.pool = _Pool(layout, num_blocks, torch.zeros(num_blocks, 1, 1, 1, 1, 1, dtype=torch.int8))
        self.block_bytes, self.blocks = layout.block_bytes, BlockManager(num_blocks, block_size)
        self.group, self.is_pipeline = ALONE, num_places > 1
        self.runs_ahead = costs.runs_ahead and not self.is_pipeline
        self.max_num_unread = num_places - 1 if self.is_pipeline else int(costs.runs_ahead)
        self._times, self._estimator = times, estimator
        self._ratios, self._rng = costs.step_ratios, rng
        self._clock = clock
        self._free_at = [0.0] * num_places  # when the last launched step has passed each

    def launch(self, batch: Batch) -> Launched:
        chunks = [(row.start, row.length) for row in batch.prefills]
        shape = StepShape.of(chunks, [sequence.num_tokens for sequence in batch.decodes])
        end, seconds = self._clock.now, self._times.seconds(shape)
        if self._ratios:
            seconds *= draw(self._ratios, self._rng)
            self._estimator.tell(shape, seconds)
        for place, free_at in enumerate(self._free_at):
            end = self._free_at[place] = max(end, free_at) + seconds
        if not (self.runs_ahead or self.is_pipeline):
            self._clock.now = end
        for row in batch.prefills:
            row.sequence.num_computed_tokens = row.end
        return Launched(batch, cast(Any, _Handle(end, self._clock)))

    def commit(self, launched: Launched, log_probs_of: None = None) -> list[Sequence]:
        self._clock.now = max(self._clock.now, cast(_Handle, launched.handle).end)
        for sequence in launched.batch.decodes:
            sequence.num_computed_tokens += 1
        live = [sequence for sequence in launched.batch.sampled if not sequence.is_finished]
        for sequence in live:
            sequence.append(0, frozenset())
        return live


@dataclass(slots=True)
class _Line:
    """Copies one after the other."""

    clock: Clock
    free_at: float = 0.0
    in_flight: deque[tuple[Any, float, float]] = field(default_factory=deque)  # what, when it ends, seconds of it

    def start(self, what: Any, seconds: float) -> None:
        self.free_at = max(self.free_at, self.clock.now) + seconds
        self.in_flight.append((what, self.free_at, seconds))

    def take_ended(self) -> list[tuple[Any, float]]:
        ended = []
        while self.in_flight and self.in_flight[0][1] <= self.clock.now:
            what, _, seconds = self.in_flight.popleft()
            ended.append((what, seconds))
        return ended

    @property
    def next_end(self) -> float | None:
        return self.in_flight[0][1] if self.in_flight else None

    def wait(self, timeout_s: float) -> None:
        end = self.clock.now + timeout_s if self.next_end is None else min(self.next_end, self.clock.now + timeout_s)
        self.clock.now = max(self.clock.now + LEAST_WAIT_S, end)


class SimulatedPuller:
    def __init__(self, costs: Costs, block_size: int, clock: Clock) -> None:
        self._costs, self._block_bytes = costs, costs.kv_token_bytes * block_size
        self._line = _Line(clock)

    @property
    def num_in_flight(self) -> int:
        return len(self._line.in_flight)

    def start(self, pull: Pull) -> None:
        pull.num_bytes = len(pull.target_block_ids) * self._block_bytes
        self._line.start(pull, self._costs.pull_base_s + pull.num_bytes / self._costs.pull_bytes_per_s)

    def completed(self) -> list[Pull]:
        pulls = []
        for pull, seconds in self._line.take_ended():
            pull.seconds = seconds
            pulls.append(pull)
        return pulls

    def wait(self, timeout_s: float) -> None:
        self._line.wait(timeout_s)


class SimulatedSwapper:
    def __init__(self, costs: Costs, block_size: int, clock: Clock) -> None:
        self._block_s = costs.kv_token_bytes * block_size / costs.swap_bytes_per_s
        self._lines: dict[Way, _Line] = {"out": _Line(clock), "in": _Line(clock)}

    @property
    def num_in_flight(self) -> int:
        return sum(len(line.in_flight) for line in self._lines.values())

    def start(self, swap: Swap, way: Way) -> None:
        self._lines[way].start(swap, len(swap.source_block_ids) * self._block_s)

    def completed(self) -> list[Swapped]:
        return [
            Swapped(swap.request_id, way, len(swap.source_block_ids), seconds)
            for way, line in self._lines.items()
            for swap, seconds in line.take_ended()
        ]

    def wait(self, timeout_s: float) -> None:
        busy = [line for line in self._lines.values() if line.next_end is not None] or [self._lines["out"]]
        min(busy, key=lambda line: line.next_end or 0.0).wait(timeout_s)

    def swap_in_s(self, num_blocks: int) -> float:
        return num_blocks * self._block_s


class SimulatedPeers:
    """Every pool can be mapped, at once."""

    def __init__(self, sources: dict[str, Source], acknowledge: Callable[[KVHandoff], None]) -> None:
        self._sources = sources
        self.acknowledge = acknowledge
        self.attaching: list[Any] = []

    def attach(self, address: str) -> None:
        pass

    def detach(self, address: str) -> None:
        pass

    def end_links(self, address: str) -> None:
        pass

    def receive_handles(self) -> list[tuple[str, str | None]]:
        return []

    def why_unmappable(self, address: str) -> str | None:
        return None

    def source(self, address: str) -> Source | None:
        return self._sources.get(address)


class SimulatedReplica:
    """What a worker's process does: reads what has come, then runs a step."""

    def __init__(
        self,
        replica: int,
        costs: Costs,
        times: StepTimes,
        estimator: ToldEstimator,  # the router's, too
        settings: LoopSettings,
        block_size: int,
        num_places: int,  # of its pipeline
        sources: dict[str, Source],
        acknowledge: Callable[[float, KVHandoff], None],  # told when, too
        rng: random.Random,
    ) -> None:
        self.id = replica
        self.address = f"replica-{replica}"
        self.clock = Clock()
        self.inbox: deque[Command | int] = deque()  # an id: the lease that is to end
        self.num_blocks = max(1, costs.num_kv_tokens // block_size)
        self.wakes_at: float | None = None  # by the simulation's list of events
        engine = SimulatedEngine(costs, times, estimator, block_size, self.num_blocks, self.clock, num_places, rng)
        peers = SimulatedPeers(sources, lambda handoff: acknowledge(self.clock.now, handoff))
        self.loop = EngineLoop(
            cast(Engine, engine),
            cast(Peers, peers),
            settings,
            self.address,
            puller=cast(Puller, SimulatedPuller(costs, block_size, self.clock)),
            swapper=cast(Swapper, SimulatedSwapper(costs, block_size, self.clock)),
            clock=self.clock,
        )
        self.loop.estimator = estimator
        self.num_swapped_out = 0

    def run(self, now: float) -> tuple[list[Event], float | None]:
        """One round of the worker at `now`. Returns its events, which are told at its clock's time, and when to come
        again; None: when there is something to read."""
        self.clock.now = max(self.clock.now, now)
        events: list[Event] = []
        while self.inbox:
            item = self.inbox.popleft()
            events += self.loop.end_leases([item]) if isinstance(item, int) else self.loop.handle(item)
        if self.loop.waits_for_gpu:
            return events, self.clock.now + POLL_S
        if not self.loop.has_work:
            return events, None
        before = self.clock.now
        events += self.loop.step()
        self.num_swapped_out += sum(event.num_preemptions for event in events if isinstance(event, SwapReport))
        return events, max(self.clock.now, before + LEAST_WAIT_S) if self.loop.has_work else None
