"""Requests through a deployment in virtual time: the real router, the real loops, no tensors.

    client --front--> router --control--> replicas: loops --control--> router --back--> client

What comes out are the records that a client of a real server would have written, so that all that is computed from
those (attainment, goodput, curves) is computed from these.
"""

import copy
import heapq
import random
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import NamedTuple

import msgspec

from ensemble.config import Deployment
from ensemble.errors import DistServeError
from ensemble.protocol.router_replica import (
    Command,
    FromReplica,
    KVHandoff,
    ReplicaUp,
    StartReplica,
    ToReplica,
    ToStage,
    decode_command,
    encode,
)
from ensemble.replicas.loop_settings import loop_settings
from ensemble.request import FinishReason, Request, SamplingParams, TokenLogProbs
from ensemble.router.lives import Timeline
from ensemble.router.router import Router
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints
from ensemble.transfer.puller import Source
from tools.load.records import Record
from tools.simulation.costs import Costs
from tools.simulation.noise import Front
from tools.simulation.replica import SimulatedReplica


class Ask(NamedTuple):
    """A request: when it comes, its tokens in and out, and ids of what its prompt shares with others."""

    due: float
    prompt_len: int
    output_len: int
    shared_len: int = 0  # tokens at its beginning that are those of `group`
    group: int = 0
    hints: Hints = DEFAULT_HINTS


class _Client:
    """Writes a record. Tokens that come at once are one response."""

    def __init__(
        self,
        ask: Ask,
        request_id: int,
        clock: Callable[[], float],
        back_s: float,
        front: Front,
        on_last: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.record = Record(prompt_len=ask.prompt_len, output_len=ask.output_len, due=ask.due, sent=ask.due)
        self.timeline = Timeline()
        self.hints = ask.hints
        self.targets = None
        self.deadline: float | None = None
        self.is_answered = False
        self.num_pending = self.num_leaving = 0
        self._num_due = 0  # tokens that the front has
        self._clock, self._back_s, self._front, self._on_last = clock, back_s, front, on_last

    def take(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None) -> None:
        self.is_answered = finish_reason is not None
        self._num_due += 1
        self._front.take(self)

    def hand_over(self, num_tokens: int) -> None:
        self._num_due -= num_tokens
        at, record = self._clock() + self._back_s, self.record
        if record.times and record.times[-1] == at:
            record.tokens[-1] += num_tokens
        else:
            record.times.append(at)
            record.tokens.append(num_tokens)
        if self.is_answered and not self._num_due and not record.error:
            self._on_last()

    def fail(self, error: DistServeError) -> None:
        self.record.error = str(error)
        self.is_answered = True
        self._on_last()

    def ended(self) -> None:
        pass


class Simulation:
    """One deployment from its start.

    costs: of every replica; prefill_costs: of those at home in prefill. seed: of what is not predicted.
    """

    def __init__(
        self, deployment: Deployment, costs: Costs, prefill_costs: Costs | None = None, *, seed: int = 0
    ) -> None:
        self.now = 0.0
        self._costs = costs
        by_home = {"decode": costs, "prefill": prefill_costs or costs}
        times = {home: each.times for home, each in by_home.items()}
        fitted = {home: each.estimator() for home, each in by_home.items()}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._num_open = 0  # requests that have not ended
        self._ids = count(1)
        rng = random.Random(seed)
        self._front = Front(costs.out_s, costs.response_s, costs.num_senders, rng, self._time, self._at)
        self._sources: dict[str, Source] = {}
        self.router = Router(deployment, self._send, lambda: next(self._ids), 0.0)
        self.replicas: dict[int, SimulatedReplica] = {}
        for known in self.router.fleet:
            settings = loop_settings(deployment, known.home)
            replica = SimulatedReplica(
                known.id,
                by_home[known.home],
                times[known.home],
                copy.deepcopy(fitted[known.home]),
                settings,
                deployment.block_size,
                deployment.stage(known.home).pipeline_parallel_size,
                self._sources,
                self._acknowledge,
                rng,
            )
            self._sources[replica.address] = Source([], {}, address=replica.address, num_blocks=replica.num_blocks)
            self.replicas[known.id] = replica
        for known in self.router.fleet:
            replica = self.replicas[known.id]
            up = ReplicaUp(
                replica=known.id,
                life=0,
                device=known.device,
                num_blocks=replica.num_blocks,
                num_host_blocks=replica.loop.num_host_blocks,
                num_places=deployment.num_places(known.home),
                pid=0,
                peer_address=replica.address,
            )
            self.router.receive(up, 0.0)
            known.estimator = replica.loop.estimator
        self.router.tick(0.0)

    def run(self, asks: Iterable[Ask]) -> list[Record]:
        """Serves all requests to their ends. Returns their records in the order of `asks`."""
        clients = []
        for ask in asks:
            request_id = next(self._ids)
            client = _Client(
                ask, request_id, self._time, self._costs.back_s, self._front, partial(self._answered, request_id)
            )
            clients.append(client)
            request = Request(
                request_id=request_id,
                prompt_token_ids=_token_ids(ask, request_id),
                sampling=SamplingParams(max_tokens=ask.output_len, ignore_eos=True, temperature=0),
            )
            self._at(ask.due + self._costs.front_s, partial(self._arrive, request, client))
        self._num_open = len(clients)
        while self._num_open:
            if not self.step():
                raise RuntimeError(f"{self._num_open} requests are left, and nothing happens any more")
        return [client.record for client in clients]

    def step(self) -> bool:
        """Whether there was something left to happen; it has happened now."""
        if not self._events:
            return False
        self.now, _, what = heapq.heappop(self._events)
        what()
        return True

    @property
    def num_swapped_out(self) -> int:
        """Sequences so far, of all replicas."""
        return sum(replica.num_swapped_out for replica in self.replicas.values())

    # ----

    def _at(self, time: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), what))

    def _time(self) -> float:
        return self.now

    def _arrive(self, request: Request, client: _Client) -> None:
        self.router.arrive(request, client, self.now)
        self._tick()

    def _answered(self, request_id: int) -> None:
        """The stream's last response is on its way, or its error is."""
        self._num_open -= 1
        self._at(self.now, partial(self.router.answered, request_id))

    def _tick(self) -> None:
        self.router.tick(self.now)

    def _send(self, stage: str, item: ToStage) -> None:
        if isinstance(item, ToReplica):
            command = decode_command(item.command)
            self._at(self.now + self._costs.control_s, partial(self._reach, self.replicas[item.replica], command))
        elif isinstance(item, StartReplica):
            raise RuntimeError("no replica dies here")

    def _reach(self, replica: SimulatedReplica, item: Command | int) -> None:
        replica.inbox.append(item)
        self._wake(replica, max(self.now, replica.clock.now))

    def _wake(self, replica: SimulatedReplica, time: float) -> None:
        if replica.wakes_at is None or time < replica.wakes_at:
            replica.wakes_at = time
            self._at(time, partial(self._run, replica, time))

    def _run(self, replica: SimulatedReplica, time: float) -> None:
        if replica.wakes_at != time:
            return  # it was woken sooner
        replica.wakes_at = None
        events, again_at = replica.run(self.now)
        for event in events:
            told = FromReplica(replica=replica.id, life=0, event=msgspec.Raw(encode(event)))
            self._at(replica.clock.now + self._costs.control_s, partial(self._hear, told))
        if again_at is not None:
            self._wake(replica, again_at)

    def _hear(self, told: FromReplica) -> None:
        self.router.receive(told, self.now)
        self._tick()

    def _acknowledge(self, time: float, handoff: KVHandoff) -> None:
        replica = next(each for each in self.replicas.values() if each.address == handoff.source)
        self._at(max(self.now, time), partial(self._reach, replica, handoff.request_id))


def _token_ids(ask: Ask, request_id: int) -> list[int]:
    """Those of a group begin alike; everything else is the request's own."""
    shared = min(ask.shared_len, ask.prompt_len)
    return [ask.group + 1] * shared + [-request_id] * (ask.prompt_len - shared)
