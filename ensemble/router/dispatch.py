"""What goes where now: asks the schedulers, tells the replicas."""

import time
from collections.abc import Callable

import msgspec

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment, StageName
from ensemble.errors import DistServeError
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
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Life, Lives
from ensemble.router.predictions import DEFAULT_TTFT_S, Predictions
from ensemble.router.prefix_moves import PrefixMoves
from ensemble.router.ways import Ways
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.decode_policies import DecodePolicySettings
from ensemble.scheduling.decoders import DecodeLimits, Decoders, Progress
from ensemble.scheduling.estimates import OutputEstimate
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefix_index import PrefixIndex
from ensemble.scheduling.roles import Pressure, Side

Send = Callable[[StageName, ToStage], None]  # to the home of a replica; never waits
MAX_BATCHES_IN_FLIGHT = 2  # one runs, one is behind it


class Dispatch:
    """The schedulers, and how replicas of each role are entered in them."""

    def __init__(
        self,
        deployment: Deployment,
        lives: Lives,
        fleet: Fleet,
        send: Send,
        fail: Callable[[Life, DistServeError], None],
        new_id: Callable[[], int],
    ) -> None:
        self._deployment = deployment
        self._lives = lives
        self._fleet = fleet
        self._send = send
        self._fail = fail
        self.prefixes = PrefixIndex(deployment.block_size)  # stays empty where replicas keep no prefixes
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
            limits_now=lambda replica_id, limits: self.ways.limits_now(replica_id, limits),
        )
        self.decoders = (
            Decoders(deployment.decode.watermark, deployment.block_size, self._progress)
            if is_optimistic
            else Decoders()
        )
        self.admission = DecodeAdmission(
            self.decoders,
            block_size=deployment.block_size,
            max_bridge_wait_s=deployment.prefill.max_bridge_wait_s,
            wait_s=lambda num_blocks: self.predictions.wait_for_blocks_s(num_blocks),
            expected_kv_tokens=self.output_estimate.num_kv_tokens if is_optimistic else None,
        )
        self.predictions = Predictions(
            deployment, lives, fleet, self.prefill, self.admission, self.output_estimate, self.prefixes
        )
        self.prefix_moves = PrefixMoves(self.prefill, self.decoders, self.prefixes, self.command, new_id)
        self.ways = Ways(deployment, lives, fleet, self.prefill, self.admission, self.predictions, self.prefix_moves)

    # ---- replicas

    def replica_up(self, replica: Replica, up: ReplicaUp) -> list[int]:
        """Enters a replica's new life. Returns the attempts in the queue that no known pool could ever hold."""
        num_host_blocks = up.num_host_blocks if self._policy.fills_host_pool else 0
        limits = DecodeLimits(up.num_places, num_host_blocks)
        is_spare = self.ways.is_spare(replica)
        is_open = replica.takes_sequences or is_spare
        self.decoders.replica_up(replica.id, replica.credits, limits, is_open=is_open, is_spare=is_spare)
        refused = self.prefill.replica_up(replica.id, replica.credits, self.ways.prompt_limits(replica))
        self._attach(replica)
        return refused

    def role_changed(self, replica: Replica) -> list[int]:
        """Its role or its state is another one; what it has goes on there. See `replica_up`."""
        self.predictions.forget(replica.id)
        is_spare = self.ways.is_spare(replica)
        self.decoders.set_open(replica.id, replica.takes_sequences or is_spare, is_spare=is_spare)
        refused = self.prefill.set_limits(replica.id, self.ways.prompt_limits(replica))
        self._attach(replica)
        return refused

    def replica_down(self, replica: Replica) -> None:
        self.predictions.forget(replica.id)
        self.prefill.replica_down(replica.id)
        self.decoders.replica_down(replica.id)
        self.prefixes.replica_down(replica.id)
        self.prefix_moves.replica_down(replica)

    def replica_removed(self, replica: Replica) -> None:
        self.prefill.replica_removed(replica.id)
        self.decoders.replica_removed(replica.id)

    def released(self, replica: Replica, attempt_ids: list[int], num_free_blocks: int) -> None:
        """It has freed the blocks of these, and has so many free."""
        replica.num_free_blocks = num_free_blocks
        self.prefill.released(replica.id, attempt_ids)
        self.decoders.released(replica.id, attempt_ids)

    def command(self, replica: Replica, command: Command) -> None:
        item = ToReplica(replica=replica.id, life=replica.life, command=msgspec.Raw(encode(command)))
        self._send(replica.home, item)

    def _attach(self, replica: Replica) -> None:
        """Who will read a pool maps it now: the first hand-off need not wait for that."""
        others = [other for other in self._fleet.up_ones() if other.id != replica.id]
        for source, reader in [(other, replica) for other in others] + [(replica, other) for other in others]:
            hands_off = source.takes_prompts and reader.takes_sequences
            may_fetch = self._deployment.prefill.prefix_cache and source.takes_sequences and reader.takes_prompts
            if (hands_off or may_fetch) and "mixed" not in (source.role, reader.role):
                self.command(reader, AttachPeer(address=source.peer_address))

    # ---- requests

    def enqueue(self, life: Life, now: float, *, is_again: bool = False, first: Life | None = None) -> None:
        """Raises Overloaded, or InvalidRequest where no pool could ever hold it.

        `first`: another request with the same prompt. As long as that is not computed this one waits for it, if there
        is a prefix cache to share its blocks by.
        """
        request, hints, is_sharing = life.attempt, life.client.hints, False
        self.admission.check(request)
        self.predictions.has_targets |= request.itl_target_s is not None
        if not is_again:
            self.ways.check_targets(life, now)
        if self._deployment.prefill.prefix_cache:
            token_ids = request.prompt_token_ids + request.resumed_token_ids
            life.hashes = block_hashes(token_ids, self.prefixes.block_size)
            num_cached_tokens = max(
                (
                    self.prefixes.num_cached_tokens(replica.id, life.hashes, request.prefill_len)
                    for replica in self._fleet.up_ones()
                    if self.ways.prompt_limits(replica) is not None
                ),
                default=0,
            )
            is_sharing = first is not None and not first.output_token_ids and len(life.hashes) > 0
            if is_sharing:
                num_cached_tokens = min(len(life.hashes) * self.prefixes.block_size, request.prompt_len - 1)
            hints = Hints(hints.priority, hints.tenant, hints.ttft_target_s, num_cached_tokens)
        self.prefill.add(request, now, hints, is_again=is_again, is_sharing=is_sharing)
        if is_sharing and first is not None:
            first.sharing.append(request.request_id)
        if life.is_alone:
            self.ways.set_alone(request.request_id)
            self.decoders.set_alone(request.request_id)

    def share_prompt(self, life: Life) -> None:
        """Its prompt is computed: requests that waited for that may start."""
        sharing, life.sharing = life.sharing, []
        for request_id in sharing:
            self.prefill.share(request_id)

    def ended(self, attempt_id: int) -> None:
        """An attempt is over: it has all its tokens, or is given up."""
        self.ways.clear_alone(attempt_id)
        self.prefix_moves.attempt_ended(attempt_id)

    def no_longer_alone(self, life: Life) -> None:
        life.is_alone = False
        self.ways.clear_alone(life.attempt_id)
        self.decoders.clear_alone(life.attempt_id)

    def dispatch(self, now: float) -> None:
        """Everything that can start now, starts: first what has waited in the bridge."""
        self.predictions.look_again(now)
        self.decoders.look_again(now)
        self.ways.look_again()
        while submission := self.admission.next_submission():
            self._join(submission.replica, submission.request_ids)
        while True:
            batch = self.prefill.next_batch(now, self.ways.may_start)
            refused = self.ways.take_refused()
            for each, error in refused:
                self._fail(each, error)
            if batch is None and refused:
                continue
            if batch is None:
                return
            replica = self._fleet.get(batch.replica)
            assert replica is not None, "the scheduler has only replicas of the fleet"
            chunks = []
            for chunk in batch.chunks:
                life = self._lives.of_attempt(chunk.request_id)
                assert life is not None, "the queue has only live requests"
                stays = life.decode_replica is not None
                request = chunk.request if chunk.is_first else None
                chunks.append(PromptChunk(request_id=chunk.request_id, end=chunk.end, request=request, stays=stays))
            run = RunPrompts(
                batch_id=batch.batch_id,
                chunks=chunks,
                num_behind=self.predictions.num_queued,
                pace=self.predictions.pace,
            )
            self.command(replica, run)

    def move(self, life: Life, replica_id: int) -> bool:
        """Takes a sequence of the bridge to this replica, if that has room for it now."""
        if not self.admission.submit(life.attempt_id, replica_id):
            return False
        self._join(replica_id, [life.attempt_id])
        return True

    def _progress(self, attempt_id: int) -> Progress:
        life = self._lives.of_attempt(attempt_id)
        if life is None:  # it has ended, and its replica will say so
            return Progress(0, 0)
        num_more_tokens = self.output_estimate.num_more_tokens(life.attempt, len(life.output_token_ids))
        return Progress(life.num_tokens, num_more_tokens)

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
            timeline.decode_replica = replica_id
            if not life.has_decoded:
                timeline.decode_submitted_ns = time_ns
            life.submitted_s = self.predictions.now
        self.predictions.forget(replica_id)
        self.command(replica, Join(arrivals=arrivals))

    # ---- roles

    def pressure(self) -> Pressure:
        self.predictions.look_again(self.predictions.now)
        return self.predictions.pressure(self.ways.computing())

    def to_change(self, side: Side) -> Replica | None:
        """The replica of the other side that has the least to do."""
        others = [each for each in self._fleet if each.state == "up" and each.role in ("prefill", "decode")]
        if side == "prefill":
            others = [replica for replica in others if replica.role == "decode"]
            return min(others, key=lambda replica: self.decoders.num_seqs(replica.id), default=None)
        others = [replica for replica in others if replica.role == "prefill"]
        return min(others, key=lambda replica: self.prefill.backlog(replica.id)[0], default=None)
