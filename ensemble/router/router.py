"""The scheduler's brain: what comes from clients and replicas, and what follows from it. No threads, no I/O.

lives     one record for each live request
fleet     the replicas
dispatch  the schedulers, and the commands
attempts  what is lost is computed again, what cannot go on is failed
changes   lives, roles and numbers of the replicas
balance   running sequences from busy replicas to others
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from ensemble.config import Deployment
from ensemble.errors import (
    Cancelled,
    DeadlineExceeded,
    DistServeError,
    StageUnavailable,
)
from ensemble.protocol.router_replica import (
    AttachFailed,
    CancelRequests,
    Detached,
    Event,
    FromReplica,
    FromStage,
    HandedOff,
    Joined,
    KVHandoff,
    Preempted,
    PrefixLeased,
    PrefixPulled,
    PrefixReport,
    PullsFailed,
    Released,
    ReplicaDown,
    ReplicaUp,
    ReplicaWaits,
    StepDone,
    SwapReport,
    decode_event,
)
from ensemble.request import Request
from ensemble.router.attempts import Attempts
from ensemble.router.balance import Balance
from ensemble.router.dispatch import Dispatch, Send
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.fleet_changes import FleetChanges
from ensemble.router.gauges import Gauges, Labels, Totals, gauges
from ensemble.router.lives import Client, Life, Lives, Output
from ensemble.scheduling.deadlines import Deadlines

Observe: TypeAlias = Callable[[str, Sequence[float], Labels], None]  # values for a histogram
MAX_MISSING_S = 30.0  # requests wait so long for a fleet that cannot serve them
BY_CLIENT = "the client cancelled the request"


class Router:
    """`now` is time.monotonic() of what is told."""

    def __init__(
        self,
        deployment: Deployment,
        send: Send,
        new_id: Callable[[], int],
        now: float,
        observe: Observe = lambda name, values, labels: None,
    ) -> None:
        self._holds_first_tokens = deployment.scheduler.first_token == "held"
        self._observe = observe
        self._deadlines = Deadlines()
        self._totals: Totals = Counter()
        self.lives = Lives()
        self.fleet = Fleet(deployment.replicas(), is_auto=deployment.scheduler.roles == "auto")
        self.dispatch = Dispatch(
            deployment, self.lives, self.fleet, send, lambda life, error: self.attempts.fail(life, error), new_id
        )
        self.attempts = Attempts(
            deployment, self.lives, self.fleet, self.dispatch, self._deadlines, self._totals, new_id
        )
        self.changes = FleetChanges(
            deployment, self.lives, self.fleet, self.dispatch, self.attempts, send, self._totals, now
        )
        self.balance = Balance(deployment, self.lives, self.fleet, self.dispatch)
        self._missing_since: float | None = now  # since when nobody could be served; None: somebody can
        self._gave_up = False  # waiting for that to end
        self._is_closed = False

    # ---- clients

    def arrive(self, request: Request, client: Client, now: float, same_prompt: int | None = None) -> None:
        """Queues a request, or fails it at once. `same_prompt`: an earlier request, with the same prompt."""
        life = Life(request, client, request, now)
        first = None if same_prompt is None else self.lives.get(same_prompt)
        try:
            if self._is_closed:
                raise StageUnavailable("scheduler", "the server is stopping")
            missing = self.fleet.missing
            if missing is not None and self._gave_up:
                raise StageUnavailable(missing, self.fleet.why_missing(missing))
            self.dispatch.enqueue(life, now, first=first)
        except DistServeError as error:
            client.fail(error)
            return
        self.lives.add(life)
        if client.deadline is not None:
            self._deadlines.add(life.request_id, client.deadline)

    def cancel(self, request_id: int) -> None:
        """Ends a request wherever it is; its client gets CANCELLED."""
        life = self.lives.get(request_id)
        if life is not None and not life.client.is_answered:  # else it has what it wanted, and closed before we knew
            self.attempts.fail(life, Cancelled(BY_CLIENT))

    def answered(self, request_id: int) -> None:
        """Its last response was sent, after its last token or a stop string."""
        life = self.lives.get(request_id)
        if life is not None:
            self.attempts.give_up(life)
            self.attempts.remove(life)
            self.dispatch.output_estimate.observe(life.request, len(life.output_token_ids))
            life.client.ended()

    def close(self) -> None:
        """Ends every request with an error, and takes no more."""
        self._is_closed = True
        self.fail_all(StageUnavailable("scheduler", "the server is stopping"))

    def fail_all(self, error: DistServeError) -> None:
        for life in self.lives:
            self.attempts.fail(life, error)

    # ---- time

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest, though nothing comes."""
        times = [each for each in (self._deadlines.next, self.changes.next_deadline) if each is not None]
        times += [] if self._missing_since is None or self._gave_up else [self._missing_since + MAX_MISSING_S]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """What is due: deadlines, drains, and everything that can start."""
        for request_id in self._deadlines.take_expired(now):
            life = self.lives.get(request_id)
            if life is not None and not life.client.is_answered:
                self._totals["distserve:deadline_exceeded_total", ()] += 1
                self.attempts.fail(life, DeadlineExceeded("deadline exceeded: the request's timeout_ms has passed"))
        self._watch_missing(now)
        self.changes.tick(now)
        self.dispatch.dispatch(now)
        self.balance.tick(now)

    @property
    def is_serving(self) -> bool:
        """Whether a request that came now could be served."""
        return self.fleet.missing is None and not self._is_closed

    def _watch_missing(self, now: float) -> None:
        """A fleet that cannot serve has some time to come back; then what waits for it ends."""
        missing = self.fleet.missing
        if missing is None:
            self._missing_since, self._gave_up = None, False
            return
        self._missing_since = now if self._missing_since is None else self._missing_since
        if self._gave_up or now < self._missing_since + MAX_MISSING_S:
            return
        self._gave_up = True
        error = StageUnavailable(missing, self.fleet.why_missing(missing))
        for life in self.lives:
            if life.phase == "queued" or (life.phase == "bridge" and missing == "decode"):
                self.attempts.fail(life, error)

    # ---- replicas

    def receive(self, item: FromStage, now: float) -> None:
        """What a stage tells."""
        match item:
            case ReplicaWaits(replica=replica_id, waits_for=waits_for):
                self.fleet.waits(replica_id, waits_for)
            case ReplicaUp():
                self.changes.replica_up(item, now)
            case ReplicaDown():
                self.changes.replica_down(item, now)
            case FromReplica():
                replica = self.fleet.get(item.replica)
                if replica is not None and replica.is_up and replica.life == item.life:
                    self._event(replica, decode_event(item.event), now)

    def _event(self, replica: Replica, event: Event, now: float) -> None:
        self.dispatch.predictions.forget(replica.id)
        match event:
            case StepDone():
                self._step_done(replica, event)
            case Released(request_ids=request_ids):
                replica.num_free_blocks = event.num_free_blocks
                self.dispatch.prefill.released(replica.id, request_ids)
                self.dispatch.decoders.released(replica.id, request_ids)
            case Joined():
                self._joined(event, now)
            case Preempted():
                self.attempts.preempted(replica, event, now)
            case SwapReport():
                replica.num_swapped_seqs = event.num_swapped_seqs
                self.attempts.count_preemptions("swap", event.num_preemptions)
                replica.num_free_host_blocks = event.num_free_host_blocks
                for direction, num_bytes, seconds in (
                    ("out", event.bytes_out, event.out_s),
                    ("in", event.bytes_in, event.in_s),
                ):
                    labels = (("direction", direction),)
                    self._totals["distserve:swap_bytes_total", labels] += num_bytes
                    self._observe("distserve:swap_time_seconds", seconds, labels)
            case PrefixReport():
                if self.dispatch.prefixes is not None:
                    self.dispatch.prefixes.update(replica.id, event.stored, event.evicted)
                self._totals["vllm:prefix_cache_queries_total", ()] += event.num_queried_tokens
                self._totals["vllm:prefix_cache_hits_total", ()] += event.num_hit_tokens
            case HandedOff():
                self.attempts.handed_off(replica, event, now)
            case PrefixLeased():
                self.dispatch.prefix_moves.leased(event, now)
            case PrefixPulled():
                self._count_transfer(event.transport, event.num_bytes, event.seconds)
                self.dispatch.prefix_moves.pulled(event, now)
            case PullsFailed(reasons=reasons):
                self.attempts.pulls_failed(replica, reasons, now)
            case AttachFailed():
                self.attempts.attach_failed(replica, event, now)
            case Detached():
                self.changes.detached(event, replica)

    def _step_done(self, replica: Replica, step: StepDone) -> None:
        replica.num_free_blocks = step.num_free_blocks
        if step.timed is not None:
            shape = step.timed.shape
            if replica.estimator.has_samples:
                error = abs(replica.estimator.seconds(shape) - step.timed.seconds) / max(1e-9, step.timed.seconds)
                replica.step_error += 0.02 * (min(error, 1.0) - replica.step_error)
            replica.estimator.observe(shape, step.timed.seconds)
            if shape.num_rows:
                replica.mean_context_len = shape.num_row_keys / shape.num_rows
        for batch_id in step.batch_ids:
            self.dispatch.prefill.batch_done(replica.id, batch_id)
        handed_off = {handoff.request_id for handoff in step.handoffs}
        for attempt_id, position, token_id in zip(step.request_ids, step.positions, step.token_ids, strict=True):
            life = self.lives.of_attempt(attempt_id)
            if life is not None:
                output = Output(token_id, step.finished.get(attempt_id), step.log_probs.get(attempt_id))
                is_held = self._holds_first_tokens and attempt_id in handed_off and life.is_unseen
                if life.commit(position, token_id):
                    self._token(life, output, is_held=is_held)
        for handoff in step.handoffs:
            life = self.lives.of_attempt(handoff.request_id)
            if life is not None:  # else it was cancelled meanwhile: the replica was told, and ends the lease
                self._prefilled(life, replica, handoff)

    def _token(self, life: Life, output: Output, *, is_held: bool) -> None:
        self.dispatch.prefill.charge(life.client.hints.tenant, 1)
        timeline = life.client.timeline
        if len(life.output_token_ids) == 1:
            timeline.first_token_ns = time.time_ns()
            self.dispatch.share_prompt(life)
        life.has_decoded |= life.phase == "decode"
        if life.phase == "prefill" and life.decode_replica is not None:
            life.phase = "decode"
        if life.is_alone and life.has_progressed:
            self.dispatch.no_longer_alone(life)
        if output.finish_reason is not None:
            self.dispatch.admission.withdraw(life.attempt_id)
            self.dispatch.ended(life.attempt_id)
            self._end_lost_lease(life)
            self.lives.end_attempt(life)
            self._deadlines.remove(life.request_id)
            is_only = len(life.output_token_ids) == 1
            timeline.last_token_ns = timeline.first_token_ns if is_only else time.time_ns()
        life.held.append(output)
        if not is_held:
            life.deliver()

    def _end_lost_lease(self, life: Life) -> None:
        """It ended where it joined; its reader's word of that to the source is late, or lost."""
        if life.prefill_replica is not None or life.decode_replica is None:
            return
        for replica in self.fleet.up_ones():
            if replica.id != life.decode_replica and life.attempt_id in replica.credits:
                self.dispatch.command(replica, CancelRequests(request_ids=[life.attempt_id]))

    def _prefilled(self, life: Life, replica: Replica, handoff: KVHandoff) -> None:
        life.phase, life.handoff = "bridge", handoff
        self.dispatch.admission.arrive(life.attempt_id, replica.id)
        self.attempts.fail_unreachable(replica)

    def _joined(self, event: Joined, now: float) -> None:
        time_ns = time.time_ns()
        transports = event.transports or [""] * len(event.request_ids)
        waits = event.waited_s or [0.0] * len(event.request_ids)
        for attempt_id, seconds, num_bytes, transport, waited_s in zip(
            event.request_ids, event.transfer_s, event.transfer_bytes, transports, waits, strict=True
        ):
            life = self.lives.of_attempt(attempt_id)
            if life is not None and transport:
                self._count_transfer(transport, num_bytes, seconds)
                self._observe("distserve:kv_transfer_wait_seconds", [waited_s], (("transport", transport),))
            if life is not None:
                life.prefill_replica = None  # nothing of it is there any more
                timeline = life.client.timeline
                if not life.has_decoded:
                    timeline.decode_joined_ns = time_ns
                    timeline.kv_transfer_ns, timeline.kv_transfer_bytes = int(seconds * 1e9), num_bytes
                if num_bytes and (reader := self.fleet.get(timeline.decode_replica)) is not None:
                    reader.handoffs.observe(num_bytes, now - life.submitted_s)
                    # Blocks that were there already did not come; of all others the whole did.
                    num_blocks = -(-(life.num_tokens - 1) // self.dispatch.admission.block_size)
                    num_tokens = num_blocks * self.dispatch.admission.block_size
                    reader.kv_token_bytes = max(reader.kv_token_bytes, num_bytes / num_tokens)
                life.deliver()

    def _count_transfer(self, transport: str, num_bytes: int, seconds: float) -> None:
        if transport:
            labels = (("transport", transport),)
            self._totals["distserve:kv_transfer_bytes_total", labels] += num_bytes
            self._observe("distserve:kv_transfer_time_seconds", [seconds], labels)

    def gauges(self) -> Gauges:
        return gauges(self.lives, self.fleet, self.dispatch, self._totals)
