"""Replicas that own real block managers and compute a known answer, for tests of the router.

They do what an engine loop does, one step at a time and without a model: token `position` of a request is a function of
its prompt alone, so that whatever was lost and computed again, every client's answer is known. They fail the test when
they are sent what they cannot know, or, where admission reserves, more than fits. Where it is optimistic, what comes
waits for blocks, sequences grow, and the last one is given up when blocks run out.
"""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment
from ensemble.errors import DistServeError
from ensemble.protocol.router_replica import (
    AddReplica,
    Arrival,
    AttachPeer,
    CancelRequests,
    Command,
    Detached,
    DetachPeer,
    Event,
    FromReplica,
    FromStage,
    HandedOff,
    HandOff,
    Join,
    Joined,
    KVHandoff,
    LeasePrefix,
    Preempted,
    PrefixLeased,
    PrefixPulled,
    PrefixReport,
    PullPrefix,
    PullsFailed,
    Released,
    RemoveReplica,
    ReplicaDown,
    ReplicaUp,
    RunPrompts,
    StartReplica,
    StepDone,
    ToReplica,
    ToStage,
    decode_command,
    encode,
)
from ensemble.request import FinishReason, Request, SamplingParams, TokenLogProbs
from ensemble.router.lives import Timeline
from ensemble.router.router import Router
from ensemble.scheduling.estimator import StepShape, TimedStep
from ensemble.scheduling.policies import DEFAULT_HINTS, Hints

BLOCK_SIZE = 4


def token(request: Request, position: int) -> int:
    return (31 * request.prompt_token_ids[0] + 7 * position) % 1009


def timed(shape: StepShape) -> TimedStep:
    """A millisecond, and one for twenty tokens or five rows."""
    return TimedStep(shape, 1e-3 + 5e-5 * shape.num_prompt_tokens + 2e-4 * shape.num_rows + 1e-6 * shape.num_row_keys)


SHAPES = [StepShape(length, 10 * length) for length in (1, 4, 16, 64)]
SHAPES += [StepShape(0, 0, num_rows, num_rows * length) for num_rows in (1, 4, 16) for length in (4, 64)]


def answer(request: Request) -> list[int]:
    return [token(request, position) for position in range(request.sampling.max_tokens)]


class FakeClient:
    """Keeps what it gets, and fails the test if it gets anything after its end."""

    def __init__(self, hints: Hints = DEFAULT_HINTS, deadline: float | None = None) -> None:
        self.timeline = Timeline()
        self.hints = hints
        self.deadline = deadline
        self.is_answered = False
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: DistServeError | None = None
        self.has_ended = False

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None) -> None:
        assert not self.is_over
        self.tokens.append(token_id)
        self.finish_reason = finish_reason

    def fail(self, error: DistServeError) -> None:
        assert self.error is None and not self.has_ended
        self.error = error

    def ended(self) -> None:
        assert self.error is None and not self.has_ended
        self.has_ended = True


@dataclass
class _Prompt:
    request: Request
    stays: bool
    num_computed: int = 0


@dataclass
class _Running:
    request: Request
    outputs: list[int]


@dataclass
class FakeReplica:
    """One life. `out` is what it has said and the router has not heard."""

    id: int
    life: int
    num_blocks: int
    max_num_seqs: int
    home: str
    is_optimistic: bool
    blocks: BlockManager = field(init=False)
    inbox: deque[Command] = field(default_factory=deque)
    out: deque[Event] = field(default_factory=deque)
    prompts: dict[int, _Prompt] = field(default_factory=dict)
    chunks: deque[tuple[int, int, int | None]] = field(default_factory=deque)  # request_id, end, batch it ends
    leases: dict[int, list[int]] = field(default_factory=dict)
    cached: set[bytes] = field(default_factory=set)  # hashes of blocks of prompts that it has computed, or fetched
    fetching: dict[int, PullPrefix] = field(default_factory=dict)
    num_fetched_tokens: int = 0
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    running: dict[int, _Running] = field(default_factory=dict)
    num_given_up: int = 0
    num_failing_pulls: int = 0  # of the next ones

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, BLOCK_SIZE)

    @property
    def address(self) -> str:
        return f"{self.id}:{self.life}"

    def up(self) -> ReplicaUp:
        return ReplicaUp(
            replica=self.id,
            life=self.life,
            device="cpu",
            num_blocks=self.num_blocks,
            num_host_blocks=0,
            num_places=self.max_num_seqs,
            pid=0,
            peer_address=self.address,
            timed=[timed(shape) for shape in SHAPES],
        )

    def receive(self, fleet: "FakeFleet") -> None:
        """Handles the oldest command."""
        match self.inbox.popleft():
            case RunPrompts(batch_id=batch_id, chunks=chunks):
                for index, chunk in enumerate(chunks):
                    if chunk.request is not None:
                        self._begin(chunk.request, chunk.stays)
                    self.chunks.append((chunk.request_id, chunk.end, batch_id if index == len(chunks) - 1 else None))
            case Join(arrivals=arrivals):
                for arrival in arrivals:
                    self._join(arrival, fleet)
            case HandOff(request_ids=request_ids):
                going = [self.running.pop(each).request for each in request_ids if each in self.running]
                stay = [each for each in request_ids if each in self.arrivals or each in self.prompts]
                if going or stay:
                    self.out.append(HandedOff(handoffs=[self._lease(each) for each in going], stay=stay))
            case LeasePrefix(lease_id=lease_id, hashes=hashes):
                self._lease_prefix(lease_id, hashes)
            case PullPrefix() as pull:
                self.fetching[pull.handoff.request_id] = pull
            case CancelRequests(request_ids=request_ids):
                for request_id in request_ids:
                    self._cancel(request_id, fleet)
            case DetachPeer(address=address):
                for request_id, arrival in list(self.arrivals.items()):
                    if arrival.handoff.source == address:
                        self._cancel(request_id, fleet)
                for lease_id, pull in list(self.fetching.items()):
                    if pull.handoff.source == address:
                        self._end_fetching(lease_id, fleet, "detached")
                self.out.append(Detached(address=address))
            case AttachPeer():
                pass

    def _lease_prefix(self, lease_id: int, hashes: list[bytes]) -> None:
        """As many as are cached, and as are free: what is cached takes no blocks here."""
        num_cached = next((index for index, each in enumerate(hashes) if each not in self.cached), len(hashes))
        num_blocks = min(num_cached, self.blocks.num_free_blocks)
        assert num_blocks == num_cached or self.is_optimistic, "more was leased than there is credit for"
        if num_blocks:
            self.leases[lease_id] = self.blocks.allocate(Owner("transfer", lease_id), num_blocks)
        handoff = KVHandoff(
            request_id=lease_id,
            source=self.address,
            num_kv_tokens=num_blocks * BLOCK_SIZE,
            block_ids=list(self.leases.get(lease_id, [])),
        )
        self.out.append(PrefixLeased(handoff=handoff))

    def _end_fetching(self, lease_id: int, fleet: "FakeFleet", reason: str | None = None) -> None:
        pull = self.fetching.pop(lease_id)
        num_tokens = 0 if reason is not None else pull.handoff.num_kv_tokens
        assert reason is not None or fleet.leases(pull.handoff), "what is read is not leased"
        fleet.acknowledge(pull.handoff)
        self.num_fetched_tokens += num_tokens
        self.out.append(
            PrefixPulled(lease_id=lease_id, num_tokens=num_tokens, seconds=1e-5, num_bytes=num_tokens, reason=reason)
        )
        self._cache(pull.hashes[: num_tokens // BLOCK_SIZE])

    def _cache(self, hashes: list[bytes]) -> None:
        self.cached.update(hashes)
        self.out.append(PrefixReport(stored=hashes, evicted=[], num_queried_tokens=0, num_hit_tokens=0))

    def _begin(self, request: Request, stays: bool) -> None:
        assert request.resumed_token_ids == answer(request)[: len(request.resumed_token_ids)]
        self.prompts[request.request_id] = _Prompt(request, stays)
        if not self.is_optimistic:
            assert self._take_blocks(request, request.max_num_kv_tokens if stays else request.prefill_len)

    def _take_blocks(self, request: Request, num_tokens: int) -> bool:
        """Whether the request has blocks for so many tokens, now or before."""
        owner = Owner("sequence", request.request_id)
        num_held_blocks = len(self.blocks.blocks_of(owner)) if owner in self.blocks else 0
        num_blocks = self.blocks.blocks_for(max(1, num_tokens)) - num_held_blocks
        if num_blocks > self.blocks.num_free_blocks:
            return False
        if not num_held_blocks:
            self.blocks.allocate(owner, num_blocks)
        elif num_blocks > 0:
            self.blocks.extend(owner, num_blocks)
        return True

    def give_up(self, request_id: int) -> None:
        """A running sequence makes room: all its tokens are told."""
        del self.running[request_id]
        self.blocks.free(Owner("sequence", request_id))
        self.num_given_up += 1
        self.out.append(Preempted(request_ids=[request_id], num_free_blocks=self.blocks.num_free_blocks))

    def _grow(self) -> None:
        """Blocks for the next token of all that run, in order of joining, at the cost of the last."""
        for request_id, each in list(self.running.items()):
            num_tokens = each.request.prompt_len + len(each.outputs)
            while request_id in self.running and not self._take_blocks(each.request, num_tokens):
                last = next(reversed(self.running))
                if next(iter(self.running)) == last:
                    break  # it is the first: what holds the blocks is on its way to an end
                self.give_up(last)

    def _join(self, arrival: Arrival, fleet: "FakeFleet") -> None:
        request = arrival.request
        outputs = arrival.output_token_ids
        assert outputs == answer(request)[: len(outputs)] and len(outputs) > len(request.resumed_token_ids)
        if arrival.handoff.source == self.address:
            if request.request_id not in self.leases:
                return
            del self.leases[request.request_id]
            self.blocks.free(Owner("transfer", request.request_id))
            assert self._run(request, outputs)
        else:
            self.arrivals[request.request_id] = arrival

    def _run(self, request: Request, outputs: list[int]) -> bool:
        """False: it has to wait for blocks."""
        num_tokens = request.prefill_len if self.is_optimistic else request.max_num_kv_tokens
        if not self._take_blocks(request, num_tokens):
            assert self.is_optimistic, "more was sent than fits"
            return False
        self.running[request.request_id] = _Running(request, list(outputs))
        num_bytes = 0  # a byte for each token of the blocks that came
        if request.request_id in self.arrivals:
            num_bytes = BLOCK_SIZE * self.blocks.blocks_for(request.prompt_len + len(outputs) - 1)
        self.out.append(Joined(request_ids=[request.request_id], transfer_s=[0.0], transfer_bytes=[num_bytes]))
        return True

    def _cancel(self, request_id: int, fleet: "FakeFleet") -> None:
        if request_id in self.leases:
            self.end_lease(request_id)
        elif request_id in self.arrivals:
            fleet.acknowledge(self.arrivals.pop(request_id).handoff)
            self._released(request_id)
        elif request_id in self.prompts or request_id in self.running:
            self.prompts.pop(request_id, None)
            self.running.pop(request_id, None)
            if Owner("sequence", request_id) in self.blocks:
                self.blocks.free(Owner("sequence", request_id))
            self._released(request_id)

    def end_lease(self, request_id: int) -> None:
        if self.leases.pop(request_id, None) is not None:
            self.blocks.free(Owner("transfer", request_id))
            self._released(request_id)

    def _released(self, request_id: int) -> None:
        self.out.append(Released(request_ids=[request_id], num_free_blocks=self.blocks.num_free_blocks))

    def step(self, fleet: "FakeFleet") -> None:
        """Pulls what has arrived, computes a chunk, and a token for all that run."""
        for request_id, arrival in list(self.arrivals.items()):
            if self.num_failing_pulls:
                self.num_failing_pulls -= 1
                self._cancel(request_id, fleet)
                self.out.append(PullsFailed(reasons={request_id: "the link is broken"}))
                continue
            if not self._run(arrival.request, arrival.output_token_ids):
                break
            del self.arrivals[request_id]
            fleet.acknowledge(arrival.handoff)
        for lease_id in list(self.fetching):
            self._end_fetching(lease_id, fleet)
        self._grow()
        tokens = [
            each
            for each in self.running.values()
            if self._take_blocks(each.request, each.request.prompt_len + len(each.outputs))
        ]
        shape = StepShape(0, 0, len(tokens), sum(each.request.prompt_len + len(each.outputs) for each in tokens))
        handoffs: list[KVHandoff] = []
        batch_ids: list[int] = []
        if self.chunks and self._has_blocks_for(self.chunks[0][0]):
            request_id, end, batch_id = self.chunks.popleft()
            batch_ids += [] if batch_id is None else [batch_id]
            prompt = self.prompts.get(request_id)
            if prompt is not None:
                assert end > prompt.num_computed
                shape = shape.with_chunk(prompt.num_computed, end - prompt.num_computed)
                prompt.num_computed = end
                if end == prompt.request.prefill_len:
                    del self.prompts[request_id]
                    self._cache(block_hashes(prompt.request.prompt_token_ids, BLOCK_SIZE))
                    first = _Running(prompt.request, list(prompt.request.resumed_token_ids))
                    tokens.append(first)
                    if prompt.stays:
                        self.running[request_id] = first
                    elif len(first.outputs) + 1 < prompt.request.sampling.max_tokens:
                        handoffs.append(self._lease(prompt.request))
        for each in tokens:
            each.outputs.append(token(each.request, len(each.outputs)))
        finished = [each for each in tokens if len(each.outputs) == each.request.sampling.max_tokens]
        if tokens or batch_ids:
            self.out.append(
                StepDone(
                    request_ids=[each.request.request_id for each in tokens],
                    positions=[len(each.outputs) - 1 for each in tokens],
                    token_ids=[each.outputs[-1] for each in tokens],
                    finished={each.request.request_id: "length" for each in finished},
                    log_probs={},
                    handoffs=handoffs,
                    batch_ids=batch_ids,
                    num_free_blocks=self.blocks.num_free_blocks,
                    timed=timed(shape) if shape.num_tokens else None,
                )
            )
        for each in finished:
            self.running.pop(each.request.request_id, None)
            self.blocks.free(Owner("sequence", each.request.request_id))
            self._released(each.request.request_id)

    def _has_blocks_for(self, request_id: int) -> bool:
        prompt = self.prompts.get(request_id)  # None: it was cancelled
        return prompt is None or not self.is_optimistic or self._take_blocks(prompt.request, prompt.request.prefill_len)

    def _lease(self, request: Request) -> KVHandoff:
        request_id = request.request_id
        self.blocks.reassign(Owner("sequence", request_id), Owner("transfer", request_id))
        block_ids = list(self.blocks.blocks_of(Owner("transfer", request_id)))
        self.leases[request_id] = block_ids
        return KVHandoff(
            request_id=request_id, source=self.address, num_kv_tokens=request.prefill_len, block_ids=block_ids
        )

    @property
    def is_idle(self) -> bool:
        return not (self.inbox or self.out or self.chunks or self.arrivals or self.running or self.fetching)


class FakeFleet:
    """A router with such replicas. Nothing moves by itself: `deliver` and `step` do."""

    def __init__(self, deployment: Deployment, num_blocks: int = 12, max_num_seqs: int = 4) -> None:
        self.now = 0.0
        self.loses_acknowledgements = False
        self._is_optimistic = deployment.decode.admission == "optimistic"
        self._num_blocks, self._max_num_seqs = num_blocks, max_num_seqs
        self._num_ids = 0
        self.replicas: dict[int, FakeReplica] = {}  # that live
        self.waiting: set[int] = set()  # dead ones that may not start yet
        self.lives: dict[int, int] = {}
        self.news: deque[FromStage] = deque()  # of the stages themselves
        self.router = Router(deployment, self._send, self.new_id, self.now)
        for replica in self.router.fleet:
            self.start(replica.id)

    def new_id(self) -> int:
        self._num_ids += 1
        return self._num_ids

    def start(self, replica_id: int) -> None:
        home = self.router.fleet.get(replica_id)
        assert home is not None
        self.waiting.discard(replica_id)
        self.lives[replica_id] = self.lives.get(replica_id, -1) + 1
        life, home_name = self.lives[replica_id], home.home
        replica = FakeReplica(
            replica_id, life, self._num_blocks, self._max_num_seqs, home_name, is_optimistic=self._is_optimistic
        )
        self.replicas[replica_id] = replica
        self.news.append(replica.up())

    def kill(self, replica_id: int, *, is_final: bool = False) -> None:
        """Commands on their way to it are lost; what it has said so far is heard."""
        replica = self.replicas.pop(replica_id)
        while replica.out:
            self.news.append(self._wrapped(replica, replica.out.popleft()))
        self.news.append(ReplicaDown(replica=replica_id, life=replica.life, reason="killed", is_final=is_final))
        if not is_final:
            self.waiting.add(replica_id)

    def acknowledge(self, handoff: KVHandoff) -> None:
        if self.loses_acknowledgements:
            return
        for replica in self.replicas.values():
            if replica.address == handoff.source:
                replica.end_lease(handoff.request_id)

    def leases(self, handoff: KVHandoff) -> bool:
        """Whether what a hand-off speaks of is kept for its reader, or its source is dead."""
        sources = [replica for replica in self.replicas.values() if replica.address == handoff.source]
        return all(handoff.request_id in replica.leases for replica in sources)

    def arrive(
        self,
        prompt_len: int,
        max_tokens: int,
        hints: Hints = DEFAULT_HINTS,
        deadline: float | None = None,
        same_prompt: Request | None = None,
        beginning: int = 0,
    ) -> tuple[Request, FakeClient]:
        """`beginning`: prompts with the same one begin alike; 0: it is like no other's."""
        request_id = self.new_id()
        sampling = SamplingParams(max_tokens=max_tokens)
        prompt = [beginning + 1000 if beginning else request_id % 997 + 1] + [1] * (prompt_len - 1)
        prompt = prompt if same_prompt is None else same_prompt.prompt_token_ids
        request = Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
        client = FakeClient(hints, deadline)
        self.router.arrive(request, client, self.now, None if same_prompt is None else same_prompt.request_id)
        self.router.tick(self.now)
        return request, client

    def tick(self) -> None:
        self.router.tick(self.now)

    def deliver(self, replica_id: int) -> None:
        """The replica handles one command, and the router hears one thing of it."""
        replica = self.replicas.get(replica_id)
        if self.news:
            self.router.receive(self.news.popleft(), self.now)
        if replica is not None and replica.inbox:
            replica.receive(self)
        if replica is not None and replica.out:
            self.router.receive(self._wrapped(replica, replica.out.popleft()), self.now)
        self.tick()

    def run(self, max_rounds: int = 500) -> None:
        """Until nothing moves any more."""
        for _ in range(max_rounds):
            for replica_id in sorted(self.waiting):  # whoever waits for readers to detach will hear of it
                if not self.news and all(not replica.inbox for replica in self.replicas.values()):
                    self.start(replica_id)
            if not self.news and all(replica.is_idle for replica in self.replicas.values()):
                return
            for replica in list(self.replicas.values()):
                if replica.inbox or replica.out or self.news:
                    self.deliver(replica.id)
                else:
                    replica.step(self)
            if self.news and not self.replicas:
                self.router.receive(self.news.popleft(), self.now)
            self.tick()
        raise AssertionError("the fleet does not come to rest")

    def check(self) -> None:
        """The books of the router and of the replicas agree with themselves."""
        self.router.dispatch.prefill.check_integrity()
        self.router.dispatch.admission.check_integrity()
        self.router.dispatch.prefix_moves.check_integrity()
        running = sum(life.phase in ("prefill", "bridge", "decode") for life in self.router.lives)
        assert self.router.gauges()["vllm:num_requests_running", ()] == running
        for replica in self.replicas.values():
            replica.blocks.check_integrity()

    def assert_empty(self) -> None:
        self.check()
        for replica in self.replicas.values():
            assert replica.blocks.num_free_blocks == replica.num_blocks, f"replica {replica.id} keeps blocks"
            known = self.router.fleet.get(replica.id)
            assert known is not None and known.credits.num_requests == 0, f"credit of replica {replica.id} is held"

    def _send(self, stage: str, item: ToStage) -> None:
        match item:
            case ToReplica():
                replica = self.replicas.get(item.replica)
                if replica is not None and replica.life == item.life:
                    assert replica.home == stage
                    replica.inbox.append(decode_command(item.command))
            case StartReplica(replica=replica_id):
                if replica_id in self.waiting:
                    self.start(replica_id)
            case AddReplica(replica=replica_id):
                self.waiting.add(replica_id)
                self.lives[replica_id] = -1
            case RemoveReplica(replica=replica_id):
                if replica_id in self.replicas:
                    self.kill(replica_id, is_final=True)
                else:
                    self.waiting.discard(replica_id)
                    self.news.append(
                        ReplicaDown(
                            replica=replica_id, life=self.lives.get(replica_id, -1), reason="removed", is_final=True
                        )
                    )

    @staticmethod
    def _wrapped(replica: FakeReplica, event: Event) -> FromReplica:
        return FromReplica(replica=replica.id, life=replica.life, event=msgspec.Raw(encode(event)))
