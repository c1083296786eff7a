"""The scheduler's brain: what comes from clients and replicas, and what follows from it. No threads, no I/O.

lives     one record for each live request
fleet     the replicas
dispatch  the schedulers, and the commands
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from ensemble.config import Deployment, Role, StageName
from ensemble.errors import (
    Cancelled,
    DeadlineExceeded,
    DistServeError,
    InvalidRequest,
    StageUnavailable,
)
from ensemble.protocol.router_replica import (
    AddReplica,
    AttachFailed,
    CancelRequests,
    Detached,
    DetachPeer,
    Event,
    FromReplica,
    FromStage,
    Joined,
    KVHandoff,
    Preempted,
    PrefixReport,
    PullsFailed,
    Released,
    RemoveReplica,
    ReplicaDown,
    ReplicaUp,
    ReplicaWaits,
    StartReplica,
    StepDone,
    SwapReport,
    decode_event,
)
from ensemble.request import Request
from ensemble.router.dispatch import Dispatch, Send
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Client, Life, Lives, Output
from ensemble.scheduling.deadlines import Deadlines
from ensemble.scheduling.roles import RolePolicy

Labels: TypeAlias = tuple[tuple[str, str], ...]
Observe: TypeAlias = Callable[[str, Sequence[float], Labels], None]  # values for a histogram
Gauges = Mapping[tuple[str, Labels], float]  # (name, labels) |-> value; of counters, the total so far
MAX_MISSING_S = 30.0  # requests wait so long for a fleet that cannot serve them
ROLES_INTERVAL_S = 0.5  # between two looks at what each side bears
DEATHS_BEFORE_ALONE = 2  # in a row, after which a request is tried again alone
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
        self._deployment = deployment
        self._send = send
        self._holds_first_tokens = deployment.scheduler.first_token == "held"
        self._new_id = new_id  # of attempts; the first attempt's id is the request's own
        self.lives = Lives()
        self._is_auto = deployment.scheduler.roles == "auto"
        self.fleet = Fleet(deployment.replicas(), is_auto=self._is_auto)
        self.dispatch = Dispatch(deployment, self.lives, self.fleet, send, self._fail)
        self._roles = RolePolicy(deployment.scheduler.min_prefill_replicas, deployment.scheduler.max_prefill_replicas)
        self._roles_due = now
        self._observe = observe
        self._deadlines = Deadlines()
        self._totals: Counter[tuple[str, Labels]] = Counter()
        self._missing_since: float | None = now  # since when nobody could be served; None: somebody can
        self._gave_up = False  # waiting for that to end
        self._is_closed = False

    # ---- clients

    def arrive(self, request: Request, client: Client, now: float) -> None:
        """Queues a request, or fails it at once."""
        life = Life(request, client, request, now)
        try:
            if self._is_closed:
                raise StageUnavailable("scheduler", "the server is stopping")
            missing = self.fleet.missing
            if missing is not None and self._gave_up:
                raise StageUnavailable(missing, self.fleet.why_missing(missing))
            self.dispatch.enqueue(life, now)
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
            self._fail(life, Cancelled(BY_CLIENT))

    def answered(self, request_id: int) -> None:
        """Its last response was sent, after its last token or a stop string."""
        life = self.lives.get(request_id)
        if life is not None:
            self._give_up_attempt(life)
            self._remove(life)
            self.dispatch.output_estimate.observe(life.request, len(life.output_token_ids))
            life.client.ended()

    def close(self) -> None:
        """Ends every request with an error, and takes no more."""
        self._is_closed = True
        self.fail_all(StageUnavailable("scheduler", "the server is stopping"))

    def fail_all(self, error: DistServeError) -> None:
        for life in self.lives:
            self._fail(life, error)

    # ---- time

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest, though nothing comes."""
        times = [replica.drain_until for replica in self.fleet if replica.drain_until is not None]
        times += [] if self._deadlines.next is None else [self._deadlines.next]
        times += [self._roles_due] if self._shifts_roles else []
        times += [] if self._missing_since is None or self._gave_up else [self._missing_since + MAX_MISSING_S]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """What is due: deadlines, drains, and everything that can start."""
        for request_id in self._deadlines.take_expired(now):
            life = self.lives.get(request_id)
            if life is not None and not life.client.is_answered:
                self._totals["distserve:deadline_exceeded_total", ()] += 1
                self._fail(life, DeadlineExceeded("deadline exceeded: the request's timeout_ms has passed"))
        self._watch_missing(now)
        self._drain(now)
        self._shift_roles(now)
        self.dispatch.dispatch(now)

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
                self._fail(life, error)

    # ---- replicas

    def receive(self, item: FromStage, now: float) -> None:
        """What a stage tells."""
        match item:
            case ReplicaWaits(replica=replica_id, waits_for=waits_for):
                self.fleet.waits(replica_id, waits_for)
            case ReplicaUp():
                self._replica_up(item, now)
            case ReplicaDown():
                self._replica_down(item, now)
            case FromReplica():
                replica = self.fleet.get(item.replica)
                if replica is not None and replica.is_up and replica.life == item.life:
                    self._event(replica, decode_event(item.event), now)

    def _event(self, replica: Replica, event: Event, now: float) -> None:
        match event:
            case StepDone():
                self._step_done(replica, event)
            case Released(request_ids=request_ids):
                replica.num_free_blocks = event.num_free_blocks
                self.dispatch.prefill.released(replica.id, request_ids)
                self.dispatch.admission.released(replica.id, request_ids)
            case Joined():
                self._joined(event, now)
            case Preempted():
                self._preempted(replica, event, now)
            case SwapReport():
                replica.num_swapped_seqs = event.num_swapped_seqs
                self._count_preemptions("swap", event.num_preemptions)
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
            case PullsFailed(reasons=reasons):
                self._pulls_failed(replica, reasons, now)
            case AttachFailed():
                self._attach_failed(replica, event, now)
            case Detached(address=address):
                self._start(self.fleet.detached(address, replica.id))

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
        self._fail_unreachable(replica)

    def _joined(self, event: Joined, now: float) -> None:
        time_ns = time.time_ns()
        transports = event.transports or [""] * len(event.request_ids)
        waits = event.waited_s or [0.0] * len(event.request_ids)
        for attempt_id, seconds, num_bytes, transport, waited_s in zip(
            event.request_ids, event.transfer_s, event.transfer_bytes, transports, waits, strict=True
        ):
            life = self.lives.of_attempt(attempt_id)
            if life is not None and transport:
                labels = (("transport", transport),)
                self._totals["distserve:kv_transfer_bytes_total", labels] += num_bytes
                self._observe("distserve:kv_transfer_time_seconds", [seconds], labels)
                self._observe("distserve:kv_transfer_wait_seconds", [waited_s], labels)
            if life is not None:
                life.prefill_replica = None  # nothing of it is there any more
                timeline = life.client.timeline
                timeline.decode_joined_ns = time_ns
                timeline.kv_transfer_ns, timeline.kv_transfer_bytes = int(seconds * 1e9), num_bytes
                if num_bytes and (reader := self.fleet.get(timeline.decode_replica)) is not None:
                    reader.handoffs.observe(num_bytes, now - life.submitted_s)
                    # Blocks that were there already did not come.
                    reader.kv_token_bytes = max(reader.kv_token_bytes, num_bytes / life.attempt.prefill_len)
                life.deliver()

    def _replica_up(self, up: ReplicaUp, now: float) -> None:
        known = self.fleet.get(up.replica)
        if known is not None and known.is_up and known.life != up.life:  # its stage has no more to say of the old life
            self._replica_down(ReplicaDown(replica=up.replica, life=known.life, reason="another life began"), now)
        replica = self.fleet.up(up)
        if replica is not None:
            self._pools_changed(self.dispatch.replica_up(replica, up))

    def _replica_down(self, down: ReplicaDown, now: float) -> None:
        replica = self.fleet.down(down.replica, down.life, down.reason)
        if replica is not None:
            held = replica.credits.request_ids
            for reader in self.fleet.detach(replica):
                self.dispatch.command(reader, DetachPeer(address=replica.peer_address))
            if not any(reader.id != replica.id for reader in self.fleet.up_ones()):
                self._start(replica.id)
            for replica_id in self.fleet.reader_down(replica.id):
                self._start(replica_id)
            self.dispatch.replica_down(replica)
            for attempt_id in held:
                self._lost(attempt_id, replica, down.reason, now)
            for source in self.fleet.up_ones():
                self._fail_unreachable(source)
        if down.is_final:
            self._removed(down.replica)

    def _lost(self, attempt_id: int, replica: Replica, reason: str, now: float) -> None:
        """A dead replica had something of this attempt."""
        life = self.lives.of_attempt(attempt_id)
        if life is not None and replica.id not in (life.prefill_replica, life.decode_replica):
            return  # its KV has arrived elsewhere; only the end of its lease was still to be told
        if life is None:
            self._release_everywhere(attempt_id)  # also of a cancelled request, whose reader is dead now
            return
        if life.has_progressed:
            life.num_deaths = 0
        life.num_deaths += 1
        life.num_alone_deaths += life.is_alone
        if life.num_alone_deaths > self._deployment.scheduler.max_recoveries:
            stage: StageName = "decode" if life.decode_replica == replica.id else "prefill"
            self._fail(life, StageUnavailable(stage, f"{reason}, again while it had this request alone"))
            return
        life.is_alone = life.num_deaths >= DEATHS_BEFORE_ALONE
        self._recover(life, "death", now)

    def _recover(self, life: Life, cause: str, now: float) -> None:
        """What was computed is lost, or given up: the request is prefilled again, with what its client has."""
        self._totals["distserve:recoveries_total", (("cause", cause),)] += 1
        life.client.timeline.num_recoveries += 1
        self._begin_again(life, now)

    def _preempted(self, replica: Replica, event: Preempted, now: float) -> None:
        """The replica has given sequences up for others, and their blocks are free: they are prefilled again."""
        replica.num_free_blocks = event.num_free_blocks
        self.dispatch.prefill.released(replica.id, event.request_ids)
        self.dispatch.admission.released(replica.id, event.request_ids)
        for attempt_id in event.request_ids:
            life = self.lives.of_attempt(attempt_id)
            if life is not None:
                self._count_preemptions("recompute", 1)
                life.client.timeline.num_preemptions += 1
                self._begin_again(life, now)

    def _count_preemptions(self, by: str, number: int) -> None:
        self._totals["vllm:num_preemptions_total", ()] += number
        self._totals["distserve:preemptions_total", (("by", by),)] += number

    def _begin_again(self, life: Life, now: float) -> None:
        self._give_up_attempt(life)
        self.lives.begin_again(life, self._new_id())
        try:
            self.dispatch.enqueue(life, now, is_again=True)
            limit = self.dispatch.prefill.max_prompt_len
            if limit is not None and life.attempt.prefill_len > limit:
                raise StageUnavailable("prefill", f"{life.attempt.prefill_len} tokens to compute again fit no pool")
        except DistServeError as error:
            self._fail(life, error)

    def _give_up_attempt(self, life: Life) -> None:
        """Takes the attempt out of the schedulers, and has its blocks freed wherever it has any."""
        attempt_id = life.attempt_id
        self.dispatch.ended(attempt_id)
        self.dispatch.prefill.cancel(attempt_id)
        self.dispatch.admission.cancel(attempt_id)
        if life.phase != "answering":  # else the replicas have ended it themselves
            self._release_everywhere(attempt_id)

    def _release_everywhere(self, attempt_id: int) -> None:
        for replica in self.fleet.up_ones():
            if attempt_id in replica.credits:
                self.dispatch.command(replica, CancelRequests(request_ids=[attempt_id]))

    def _attach_failed(self, reader: Replica, failed: AttachFailed, now: float) -> None:
        source = next((each for each in self.fleet.up_ones() if each.peer_address == failed.address), None)
        if source is None:
            return  # it has died: its end is told, or will be
        if (source.id, reader.id) not in self.dispatch.admission.unreachable:
            print(
                f"distserve: replica {reader.id} cannot map the KV pool of replica {source.id}: {failed.reason}",
                file=sys.stderr,
                flush=True,
            )
        self.dispatch.admission.cannot_reach(source.id, reader.id)
        source.down_reason = f"replica {reader.id} cannot map the KV pool of replica {source.id}: {failed.reason}"
        for attempt_id in failed.request_ids:
            life = self.lives.of_attempt(attempt_id)
            if life is not None and not self.dispatch.admission.is_reachable_from(source.id):
                self._fail(life, StageUnavailable("decode", source.down_reason))
            elif life is not None:
                self._recover(life, "unreachable", now)
        self._fail_unreachable(source)

    def _pulls_failed(self, reader: Replica, reasons: dict[int, str], now: float) -> None:
        """The prompt is computed again, `max_recoveries` times at most."""
        for attempt_id, reason in reasons.items():
            print(f"distserve: replica {reader.id} did not get a sequence's KV: {reason}", file=sys.stderr, flush=True)
            life = self.lives.of_attempt(attempt_id)
            if life is None:
                continue
            life.num_failed_pulls += 1
            if life.num_failed_pulls > self._deployment.scheduler.max_recoveries:
                self._fail(life, StageUnavailable("decode", f"the KV does not come: {reason}"))
            else:
                self._recover(life, "transfer", now)

    def _fail_unreachable(self, source: Replica) -> None:
        """What waits in the bridge with its KV at a replica whose pool no reader can map cannot go on."""
        if self.dispatch.admission.is_reachable_from(source.id):
            return
        for life in self.lives:
            if life.phase == "bridge" and life.prefill_replica == source.id:
                self._fail(life, StageUnavailable("decode", source.down_reason))

    def _start(self, replica_id: int | None) -> None:
        """The next life of a dead replica may begin: nobody maps its pool any more."""
        replica = self.fleet.get(replica_id) if replica_id is not None else None
        if replica is not None:
            self._send(replica.home, StartReplica(replica=replica.id))

    # ---- the operator

    def set_role(self, replica: Replica, role: Role) -> None:
        """What it is given from now on; what it has goes on there."""
        replica.role = role
        if replica.is_up:
            self._pools_changed(self.dispatch.role_changed(replica))

    @property
    def _shifts_roles(self) -> bool:
        return self._is_auto and sum(replica.role != "mixed" for replica in self.fleet) > 2

    def _shift_roles(self, now: float) -> None:
        """Looks now and then whether the load wants a replica on the other side; the dead ones will be back."""
        if not self._shifts_roles or now < self._roles_due:
            return
        self._roles_due = now + ROLES_INTERVAL_S
        roles = [replica.role for replica in self.fleet]
        side = self._roles.decide(now, self.dispatch.pressure(), roles.count("prefill"), roles.count("decode"))
        replica = None if side is None else self.dispatch.to_change(side)
        if side is not None and replica is not None and self.serves_without(replica, side):
            self._totals["distserve:role_changes_total", (("to", side),)] += 1
            self.set_role(replica, side)

    def drain(self, replica: Replica, until: float | None, *, is_leaving: bool = False) -> None:
        """It gets no more requests. Those it has end there or, at `until`, go on elsewhere."""
        replica.drain_until, replica.is_leaving = until, replica.is_leaving or is_leaving
        if replica.state == "up":
            replica.state = "draining"
            self._pools_changed(self.dispatch.role_changed(replica))
        elif is_leaving and not replica.is_up:
            self._send(replica.home, RemoveReplica(replica=replica.id))

    def undrain(self, replica: Replica) -> None:
        if replica.state == "draining" and not replica.is_leaving:
            replica.state, replica.drain_until = "up", None
            self._pools_changed(self.dispatch.role_changed(replica))

    def add(self, home: StageName, device: str, role: Role) -> Replica:
        replica = self.fleet.add(home, device, role)
        self._send(home, AddReplica(replica=replica.id, device=device))
        return replica

    def serves_without(self, replica: Replica, role: Role | None = None) -> bool:
        """Whether the others, and it in another role if that is given, can do all there is to do."""
        roles = [each.role for each in self.fleet if each.state == "up" and each.id != replica.id]
        roles += [] if role is None else [role]
        return any(each != "decode" for each in roles) and any(each != "prefill" for each in roles)

    def _drain(self, now: float) -> None:
        for replica in self.fleet:
            if replica.state != "draining":
                continue
            if replica.drain_until is not None and now >= replica.drain_until:
                replica.drain_until = None
                for attempt_id in replica.credits.request_ids:
                    life = self.lives.of_attempt(attempt_id)
                    if life is not None and replica.id in (life.prefill_replica, life.decode_replica):
                        self._recover(life, "drain", now)
            if replica.is_leaving and not replica.credits.num_requests:
                replica.state = "leaving"
                self._send(replica.home, RemoveReplica(replica=replica.id))

    def _removed(self, replica_id: int) -> None:
        replica = self.fleet.get(replica_id)
        if replica is not None:
            self.dispatch.replica_removed(replica)
            self.fleet.remove(replica_id)

    # ---- ends

    def _pools_changed(self, refused: list[int]) -> None:
        """What no known pool could ever hold ends: attempts that have left the queue so, and what has gone further."""
        limit = self.dispatch.prefill.max_prompt_len
        for attempt_id in refused:
            life = self.lives.of_attempt(attempt_id)
            if life is not None:
                field, allowed = "length of input_ids or text_input", f"the prefill pool holds {limit} tokens"
                self._fail(life, InvalidRequest(field, life.attempt.prefill_len, allowed))
        for life in self.lives:
            if life.phase in ("queued", "prefill", "bridge"):
                try:
                    self.dispatch.admission.check(life.attempt)
                except InvalidRequest as error:
                    self._fail(life, error)
        for source in self.fleet.up_ones():
            self._fail_unreachable(source)

    def _fail(self, life: Life, error: DistServeError) -> None:
        """Ends a live request with an error, wherever it is, and has its blocks freed."""
        self._give_up_attempt(life)
        self._remove(life)
        life.client.fail(error)

    def _remove(self, life: Life) -> None:
        self._deadlines.remove(life.request_id)
        self.lives.remove(life)

    # ---- metrics

    def gauges(self) -> Gauges:
        """What is the case now."""
        levels: dict[tuple[str, Labels], float] = {
            ("vllm:num_requests_waiting", ()): self.dispatch.prefill.num_waiting,
            ("vllm:num_requests_running", ()): sum(
                life.phase in ("prefill", "bridge", "decode") for life in self.lives
            ),
            ("distserve:num_requests_bridge", ()): self.dispatch.admission.num_bridge_seqs,
            ("distserve:num_tokens_waiting", ()): self.dispatch.prefill.num_waiting_tokens,
            ("vllm:num_requests_swapped", ()): sum(replica.num_swapped_seqs for replica in self.fleet.up_ones()),
            **self._totals,
        }
        prefixes = self.dispatch.prefixes
        for replica in self.fleet:
            labels = (("stage", replica.home), ("replica", str(replica.id)))
            is_up, num_blocks = replica.is_up, replica.credits.num_blocks
            levels["distserve:replica_up", labels] = int(is_up)
            levels["distserve:replica_requests", labels] = replica.credits.num_requests if is_up else 0
            levels["distserve:step_prediction_error", labels] = replica.step_error
            levels["distserve:kv_blocks", labels] = num_blocks if is_up else 0
            levels["distserve:kv_blocks_free", labels] = replica.num_free_blocks if is_up else 0
            levels["vllm:kv_cache_usage_perc", labels] = 1 - replica.num_free_blocks / num_blocks if is_up else 0
            levels["distserve:host_kv_blocks", labels] = replica.num_host_blocks if is_up else 0
            levels["distserve:host_kv_blocks_free", labels] = replica.num_free_host_blocks if is_up else 0
            levels["distserve:prefix_cache_blocks", labels] = prefixes.num_blocks(replica.id) if prefixes else 0
        for (role, state), number in Counter((replica.role, replica.state) for replica in self.fleet).items():
            levels["distserve:replicas", (("role", role), ("state", state))] = number
        return levels
