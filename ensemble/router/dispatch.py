"""What goes where now: asks the schedulers, tells the replicas."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment, StageName
from ensemble.errors import DistServeError, TargetOutOfReach
from ensemble.protocol.router_replica import (
    Arrival,
    AttachPeer,
    Command,
    Join,
    PromptChunk,
    ReplicaUp,
    RunPrompts,
    ToReplica,
    ToStage,
    encode,
)
from ensemble.request import Request
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Life, Lives
from ensemble.router.predictions import DEFAULT_TTFT_S, Predictions
from ensemble.scheduling.admission import DecodeAdmission, DecodeLimits
from ensemble.scheduling.decode_policies import DecodePolicySettings
from ensemble.scheduling.estimates import OutputEstimate
from ensemble.scheduling.placement import (
    Reader,
    Site,
    Way,
    best,
    hand_off,
    num_missed,
    smallest,
    stay,
)
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import Limits, PrefillScheduler
from ensemble.scheduling.prefix_index import PrefixIndex
from ensemble.scheduling.roles import Pressure, Side

Send = Callable[[StageName, ToStage], None]  # to the home of a replica; never waits
MAX_BATCHES_IN_FLIGHT = 2  # one runs, one is behind it
# Where sequences run too, a step is launched before the one before is read, and told then: with three it never waits.
MAX_BATCHES_BESIDE = 3


class Dispatch:
    """The schedulers, and how replicas of each role are entered in them."""

    def __init__(
        self,
        deployment: Deployment,
        lives: Lives,
        fleet: Fleet,
        send: Send,
        fail: Callable[[Life, DistServeError], None],
    ) -> None:
        self._deployment = deployment
        self._lives = lives
        self._fleet = fleet
        self._send = send
        self._fail = fail
        self._is_auto = deployment.scheduler.roles == "auto"
        self._way: tuple[int, Way | None] | None = None  # of the attempt that was asked of last, as long as it holds
        self._refused: list[tuple[Life, TargetOutOfReach]] = []
        self._alone: set[int] = set()  # attempt ids
        self.prefixes = PrefixIndex(deployment.block_size) if deployment.prefill.prefix_cache else None
        self.output_estimate = OutputEstimate()
        self._policy = DecodePolicySettings(deployment.decode.policy)
        is_optimistic = deployment.decode.admission == "optimistic"
        queue = deployment.scheduler
        self.prefill = PrefillScheduler(
            block_size=deployment.block_size,
            max_num_batched_tokens=deployment.prefill.max_num_batched_tokens,
            max_num_seqs=deployment.prefill.max_num_seqs,
            max_batches_in_flight=MAX_BATCHES_IN_FLIGHT,
            max_queue_requests=queue.max_queue_requests,
            max_queue_tokens=queue.max_queue_tokens,
            policy=QueuePolicy(queue.policy, queue.max_wait_s, queue.aging_s, queue.ttft_target_s or DEFAULT_TTFT_S),
            max_long_tokens=deployment.prefill.max_long_tokens,
            num_cached_tokens=lambda replica, request: self.predictions.num_cached_tokens(replica, request),
            limits_now=self._limits_now,
        )
        self.admission = DecodeAdmission(
            block_size=deployment.block_size,
            max_bridge_wait_s=deployment.prefill.max_bridge_wait_s,
            wait_s=lambda num_blocks: self.predictions.wait_for_blocks_s(num_blocks),
            expected_kv_tokens=self.output_estimate.num_kv_tokens if is_optimistic else None,
            watermark=deployment.decode.watermark,
        )
        self.predictions = Predictions(
            deployment, lives, fleet, self.prefill, self.admission, self.output_estimate, self.prefixes
        )

    # ---- replicas

    def replica_up(self, replica: Replica, up: ReplicaUp) -> list[int]:
        """Enters a replica's new life. Returns the attempts in the queue that no known pool could ever hold."""
        num_host_blocks = up.num_host_blocks if self._policy.fills_host_pool else 0
        limits = DecodeLimits(up.num_places, num_host_blocks)
        is_spare = self._is_spare(replica)
        is_open = replica.takes_sequences or is_spare
        self.admission.replica_up(replica.id, replica.credits, limits, is_open=is_open, is_spare=is_spare)
        refused = self.prefill.replica_up(replica.id, replica.credits, self._prompt_limits(replica))
        self._attach(replica)
        return refused

    def role_changed(self, replica: Replica) -> list[int]:
        """Its role or its state is another one; what it has goes on there. See `replica_up`."""
        is_spare = self._is_spare(replica)
        self.admission.set_open(replica.id, replica.takes_sequences or is_spare, is_spare=is_spare)
        refused = self.prefill.set_limits(replica.id, self._prompt_limits(replica))
        self._attach(replica)
        return refused

    def replica_down(self, replica: Replica) -> None:
        self.prefill.replica_down(replica.id)
        self.admission.replica_down(replica.id)
        if self.prefixes is not None:
            self.prefixes.replica_down(replica.id)

    def replica_removed(self, replica: Replica) -> None:
        self.prefill.replica_removed(replica.id)
        self.admission.replica_removed(replica.id)

    def command(self, replica: Replica, command: Command) -> None:
        item = ToReplica(replica=replica.id, life=replica.life, command=msgspec.Raw(encode(command)))
        self._send(replica.home, item)

    def _computing(self) -> list[Replica]:
        return [replica for replica in self._fleet.up_ones() if self._prompt_limits(replica) is not None]

    def _is_spare(self, replica: Replica) -> bool:
        """Whether it may decode what it has computed, though its role is to hand off."""
        return self._is_auto and replica.takes_prompts and replica.role == "prefill"

    def _prompt_limits(self, replica: Replica) -> Limits | None:
        decode = self._deployment.decode
        if replica.takes_prompts and replica.role == "prefill":
            return self.prefill.limits
        if replica.takes_prompts:
            return Limits(self._deployment.num_prompt_tokens_beside, MAX_BATCHES_BESIDE, stays=True)
        if replica.takes_sequences and self._is_auto:
            return Limits(self._deployment.num_prompt_tokens_beside, MAX_BATCHES_BESIDE, stays=True)
        if replica.takes_sequences and decode.local_prefill_tokens:
            return Limits(decode.local_prefill_tokens, MAX_BATCHES_BESIDE, decode.max_local_prompt_len, stays=True)
        return None

    def _attach(self, replica: Replica) -> None:
        """Who will read a pool maps it now: the first hand-off need not wait for that."""
        others = [other for other in self._fleet.up_ones() if other.id != replica.id]
        for source, reader in [(other, replica) for other in others] + [(replica, other) for other in others]:
            if source.takes_prompts and reader.takes_sequences and "mixed" not in (source.role, reader.role):
                self.command(reader, AttachPeer(address=source.peer_address))

    # ---- requests

    def enqueue(self, life: Life, now: float, *, is_again: bool = False) -> None:
        """Raises Overloaded, or InvalidRequest where no pool could ever hold it."""
        request, hints = life.attempt, life.client.hints
        self.admission.check(request)
        self.predictions.has_targets |= request.itl_target_s is not None
        if not is_again:
            self._check_targets(life, now)
        if self.prefixes is not None:
            token_ids = request.prompt_token_ids + request.resumed_token_ids
            life.hashes = block_hashes(token_ids, self.prefixes.block_size)
            num_cached_tokens = max(
                (
                    self.prefixes.num_cached_tokens(replica.id, life.hashes, request.prefill_len)
                    for replica in self._fleet.up_ones()
                    if self._prompt_limits(replica) is not None
                ),
                default=0,
            )
            hints = Hints(hints.priority, hints.tenant, hints.ttft_target_s, num_cached_tokens)
        self.prefill.add(request, now, hints, is_again=is_again)
        if life.is_alone:
            self._alone.add(request.request_id)
            self.admission.set_alone(request.request_id)

    def ended(self, attempt_id: int) -> None:
        """An attempt is over: it has all its tokens, or is given up."""
        self._alone.discard(attempt_id)

    def no_longer_alone(self, life: Life) -> None:
        life.is_alone = False
        self._alone.discard(life.attempt_id)
        self.admission.clear_alone(life.attempt_id)

    def dispatch(self, now: float) -> None:
        """Everything that can start now, starts: first what has waited in the bridge."""
        self.predictions.now, self._way = now, None
        while submission := self.admission.next_submission():
            self._join(submission.replica, submission.request_ids)
        while True:
            batch = self.prefill.next_batch(now, self._may_start)
            refused, self._refused, self._way = self._refused, [], None
            for each, error in refused:
                self._fail(each, error)
            if batch is None and refused:
                continue
            if batch is None:
                return
            replica = self._fleet.get(batch.replica)
            assert replica is not None, "the scheduler has only replicas of the fleet"
            time_ns = time.time_ns()
            chunks = []
            for chunk in batch.chunks:
                life = self._lives.of_attempt(chunk.request_id)
                assert life is not None, "the queue has only live requests"
                if chunk.is_first:
                    self._started(life, replica, time_ns)
                stays = life.decode_replica is not None
                request = chunk.request if chunk.is_first else None
                chunks.append(PromptChunk(request_id=chunk.request_id, end=chunk.end, request=request, stays=stays))
            num_behind_tokens = self.prefill.num_behind_tokens(replica.id)
            self.command(
                replica, RunPrompts(batch_id=batch.batch_id, chunks=chunks, num_behind_tokens=num_behind_tokens)
            )

    def _started(self, life: Life, replica: Replica, time_ns: int) -> None:
        life.phase, timeline = "prefill", life.client.timeline
        timeline.first_scheduled_ns = timeline.first_scheduled_ns or time_ns
        if life.decode_replica is not None:  # it stays
            timeline.prefill_replica, timeline.decode_replica = -1, replica.id
        else:
            life.prefill_replica = timeline.prefill_replica = replica.id

    def _join(self, replica_id: int, attempt_ids: list[int]) -> None:
        replica, time_ns = self._fleet.get(replica_id), time.time_ns()
        assert replica is not None, "the scheduler has only replicas of the fleet"
        arrivals = []
        for attempt_id in attempt_ids:
            life = self._lives.of_attempt(attempt_id)
            assert life is not None and life.handoff is not None, "the bridge has only live requests"
            arrivals.append(
                Arrival(request=life.attempt, output_token_ids=list(life.output_token_ids), handoff=life.handoff)
            )
            life.phase, life.handoff, life.decode_replica = "decode", None, replica_id
            timeline = life.client.timeline
            timeline.decode_submitted_ns, timeline.decode_replica = time_ns, replica_id
            life.submitted_s = self.predictions.now
        self.command(replica, Join(arrivals=arrivals))

    # ---- which way a request takes

    def _may_start(self, replica_id: int, request: Request) -> bool:
        life = self._lives.of_attempt(request.request_id)
        if life is None:
            return False
        if self._way is None or self._way[0] != request.request_id:
            self._way = request.request_id, self._best_way(life)
        way = self._way[1]
        if way is not None and self._refuses(life, way):
            return False
        if way is None or way.replica != replica_id:
            return False
        starts = self.admission.try_start_at if way.stays else self._try_promise
        if not starts(replica_id, request):
            return False
        self._way = None
        if way.stays:
            life.decode_replica = replica_id
        timeline = life.client.timeline
        if not timeline.predicted_first_token_ns:
            timeline.predicted_first_token_ns = time.time_ns() + int(way.ttft_s * 1e9)
        return True

    def _try_promise(self, replica_id: int, request: Request) -> bool:
        return self.admission.try_promise(request)

    def _best_way(self, life: Life) -> Way | None:
        """None: nobody could start it, were it idle."""
        target_s, itl_target_s = self._targets(life)
        left_s = None if target_s is None else life.arrived_s + target_s - self.predictions.now
        return best(self._ways(life), left_s, itl_target_s)

    def _ways(self, life: Life) -> Iterator[Way]:
        """Those that are open now, or will be when the replica has run a batch; of equals who only prefills first."""
        request = life.attempt
        order = {"prefill": 0, "mixed": 1, "decode": 2}
        num_blocks = -(-request.prefill_len // self._deployment.block_size)
        may_promise = self.admission.may_start(request)
        readers = self._readers(request) if may_promise and request.sampling.max_tokens > 1 else []
        for replica in sorted(self._fleet.up_ones(), key=lambda replica: order[replica.role]):
            limits = self._prompt_limits(replica)
            if limits is None or (limits.max_prompt_len or request.prefill_len) < request.prefill_len:
                continue
            if self._alone and not self._may_share(replica.id, life):
                continue
            work = self.predictions.work(replica, life)
            site = self.predictions.site(replica, work)
            if (limits.stays or self._is_spare(replica)) and self.admission.may_start_at(replica.id, request):
                yield stay(site, work)
            if replica.role == "decode" or not may_promise or not replica.credits.fits(num_blocks):
                continue
            if request.sampling.max_tokens == 1:
                yield stay(site, work)._replace(stays=False)
            elif way := hand_off(site, work, self._readers_of(replica, readers, site, request)):
                yield way

    def _readers(self, request: Request) -> list[tuple[Replica, Reader]]:
        """Who may decode what others compute."""
        wait_s = self.predictions.wait_for_blocks_s(self.admission.num_lacking_blocks(request, without_spare=True))
        takers = [replica for replica in self._fleet.up_ones() if replica.takes_sequences]
        readers = []
        for replica in takers:
            num_tokens = request.prefill_len - self.predictions.num_cached_tokens(
                replica.id, request
            )  # those that are not there yet
            handoff_s = replica.handoffs.seconds(round(num_tokens * replica.kv_token_bytes))
            num_promised = self.admission.num_promised_seqs / len(takers)
            site = self.predictions.site(replica).with_rows(num_promised, request.prefill_len)
            readers.append((replica, Reader(site, handoff_s, wait_s)))
        return readers

    def _readers_of(
        self, source: Replica, readers: list[tuple[Replica, Reader]], site: Site, request: Request
    ) -> list[Reader]:
        """A mixed replica hands off only to those that do nothing but decode; itself, if there is nobody else."""
        others = [
            (source.id, replica.id)
            for replica, _ in readers
            if replica.id != source.id and (source.role == "prefill" or replica.role == "decode")
        ]
        if self._is_spare(source):
            others = [pair for pair in others if pair not in self.admission.unreachable]
            if not others:
                return [Reader(site, 0.0)] if self.admission.blocks_for(request) <= source.credits.num_blocks else []
        return [reader for replica, reader in readers if (source.id, replica.id) in others]

    def _limits_now(self, replica_id: int, limits: Limits) -> Limits:
        """A batch is what a step takes; beside running sequences one more is under way."""
        replica = self._fleet.get(replica_id)
        if replica is None or not (rows := self.predictions.rows(replica)).num_rows:
            return limits
        chunk_len = self.predictions.chunk_len(replica, rows, self.predictions.itl_target_of(replica))
        return replace(
            limits,
            max_num_batched_tokens=min(limits.max_num_batched_tokens, chunk_len),
            max_batches_in_flight=MAX_BATCHES_BESIDE,
        )

    # ---- roles

    def pressure(self) -> Pressure:
        return self.predictions.pressure(self._computing())

    def to_change(self, side: Side) -> Replica | None:
        """The replica of the other side that has the least to do."""
        others = [each for each in self._fleet if each.state == "up" and each.role in ("prefill", "decode")]
        if side == "prefill":
            others = [replica for replica in others if replica.role == "decode"]
            return min(others, key=lambda replica: self.admission.num_seqs(replica.id), default=None)
        others = [replica for replica in others if replica.role == "prefill"]
        return min(others, key=lambda replica: self.prefill.backlog(replica.id)[0], default=None)

    # ---- targets

    def _targets(self, life: Life) -> tuple[float | None, float | None]:
        """TTFT and ITL, in seconds; None: there is none."""
        scheduler, ttft_s = self._deployment.scheduler, life.client.hints.ttft_target_s
        return scheduler.ttft_target_s if ttft_s is None else ttft_s, smallest(
            [life.request.itl_target_s], scheduler.itl_target_s
        )

    def _refuses(self, life: Life, way: Way) -> bool:
        """Whether it has to be refused now, since nothing of it is computed yet and it is going to miss a target."""
        if self._deployment.scheduler.on_missed_target != "refuse" or life.attempt is not life.request:
            return False
        ttft_target_s, itl_target_s = self._targets(life)
        left_s = None if ttft_target_s is None else life.arrived_s + ttft_target_s - self.predictions.now
        if not num_missed(way, left_s, itl_target_s):
            return False
        if all(life is not each for each, _ in self._refused):
            waited_s = self.predictions.now - life.arrived_s
            error = _out_of_reach(waited_s + way.ttft_s, way.itl_s, ttft_target_s, itl_target_s)
            self._refused.append((life, error))
        return True

    def _check_targets(self, life: Life, now: float) -> None:
        """Raises TargetOutOfReach where requests are refused that will miss one, behind all that wait."""
        if self._deployment.scheduler.on_missed_target != "refuse":
            return
        ttft_target_s, itl_target_s = self._targets(life)
        self.predictions.now = now
        way = best(self._ways(life), ttft_target_s, itl_target_s)
        if way is None:
            return
        ttft_s = way.ttft_s + (
            self.predictions.queue_s(self._computing()) if self._deployment.scheduler.policy == "fcfs" else 0.0
        )
        if num_missed(way._replace(ttft_s=ttft_s), ttft_target_s, itl_target_s):
            raise _out_of_reach(ttft_s, way.itl_s, ttft_target_s, itl_target_s)

    def _may_share(self, replica_id: int, life: Life) -> bool:
        """Whether the prompts that the replica computes, and this one, are none that has to be alone."""
        computed = self.prefill.unfinished(replica_id)
        return not computed if life.is_alone else self._alone.isdisjoint(computed)


def _out_of_reach(
    ttft_s: float, itl_s: float, ttft_target_s: float | None, itl_target_s: float | None
) -> TargetOutOfReach:
    if ttft_target_s is not None and ttft_s > ttft_target_s:
        return TargetOutOfReach("ttft_target_ms", ttft_target_s, ttft_s, ttft_s - ttft_target_s)
    return TargetOutOfReach("itl_target_ms or tpot_target_ms", itl_target_s or 0.0, itl_s, 1.0)
