"""What replicas tell, and what follows: tokens are committed and delivered, credit comes back, books are kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ensemble.config import Deployment
from ensemble.protocol.router_replica import (
    AttachFailed,
    CancelRequests,
    Detached,
    Event,
    HandedOff,
    Joined,
    KVHandoff,
    Preempted,
    PrefixLeased,
    PrefixPulled,
    PrefixReport,
    PullsFailed,
    Released,
    StepDone,
    SwapReport,
)
from ensemble.router.attempts import Attempts
from ensemble.router.dispatch import Dispatch
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.fleet_changes import FleetChanges
from ensemble.router.gauges import Labels, Totals
from ensemble.router.lives import Life, Lives, Output

Observe: TypeAlias = Callable[[str, Sequence[float], Labels], None]  # values for a histogram


@dataclass(eq=False)
class Events:
    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _dispatch: Dispatch
    _attempts: Attempts
    _changes: FleetChanges
    _totals: Totals
    _observe: Observe

    def receive(self, replica: Replica, event: Event, now: float) -> None:
        self._dispatch.predictions.forget(replica.id)
        match event:
            case StepDone():
                self._step_done(replica, event)
            case Released():
                self._dispatch.released(replica, event.request_ids, event.num_free_blocks)
            case Joined():
                self._joined(event, now)
            case Preempted():
                self._attempts.preempted(replica, event, now)
            case SwapReport():
                self._swapped(replica, event)
            case PrefixReport():
                self._dispatch.prefixes.update(replica.id, event.stored, event.evicted)
                self._totals["vllm:prefix_cache_queries_total", ()] += event.num_queried_tokens
                self._totals["vllm:prefix_cache_hits_total", ()] += event.num_hit_tokens
            case HandedOff():
                self._attempts.handed_off(replica, event, now)
            case PrefixLeased():
                self._dispatch.prefix_moves.leased(event, now)
            case PrefixPulled():
                self._count_transfer(event.transport, event.num_bytes, event.seconds)
                self._dispatch.prefix_moves.pulled(event, now)
            case PullsFailed(reasons=reasons):
                self._attempts.pulls_failed(replica, reasons, now)
            case AttachFailed():
                self._attempts.attach_failed(replica, event, now)
            case Detached():
                self._changes.detached(event, replica)

    def _step_done(self, replica: Replica, step: StepDone) -> None:
        replica.num_free_blocks = step.num_free_blocks
        if step.timed is not None:
            replica.observe(step.timed)
        for batch_id in step.batch_ids:
            self._dispatch.prefill.batch_done(replica.id, batch_id)
        holds_first_tokens = self._deployment.scheduler.first_token == "held"
        handed_off = {handoff.request_id for handoff in step.handoffs}
        for attempt_id, position, token_id in zip(step.request_ids, step.positions, step.token_ids, strict=True):
            life = self._lives.of_attempt(attempt_id)
            if life is not None:
                output = Output(token_id, step.finished.get(attempt_id), step.log_probs.get(attempt_id))
                is_held = holds_first_tokens and attempt_id in handed_off and life.is_unseen
                if life.commit(position, token_id):
                    self._token(life, output, is_held=is_held)
        for handoff in step.handoffs:
            life = self._lives.of_attempt(handoff.request_id)
            if life is not None:  # else it was cancelled meanwhile: the replica was told, and ends the lease
                self._prefilled(life, replica, handoff)

    def _token(self, life: Life, output: Output, *, is_held: bool) -> None:
        self._dispatch.prefill.charge(life.client.hints.tenant, 1)
        timeline = life.client.timeline
        if len(life.output_token_ids) == 1:
            timeline.first_token_ns = time.time_ns()
            self._dispatch.share_prompt(life)
        life.has_decoded |= life.phase == "decode"
        if life.phase == "prefill" and life.decode_replica is not None:
            life.phase = "decode"
        if life.is_alone and life.has_progressed:
            self._dispatch.no_longer_alone(life)
        if output.finish_reason is not None:
            self._dispatch.admission.withdraw(life.attempt_id)
            self._dispatch.ended(life.attempt_id)
            self._end_lost_lease(life)
            self._lives.end_attempt(life)
            is_only = len(life.output_token_ids) == 1
            timeline.last_token_ns = timeline.first_token_ns if is_only else time.time_ns()
        life.held.append(output)
        if not is_held:
            life.deliver()

    def _end_lost_lease(self, life: Life) -> None:
        """It ended where it joined; its reader's word of that to the source is late, or lost."""
        if life.prefill_replica is not None or life.decode_replica is None:
            return
        for replica in self._fleet.up_ones():
            if replica.id != life.decode_replica and life.attempt_id in replica.credits:
                self._dispatch.command(replica, CancelRequests(request_ids=[life.attempt_id]))

    def _prefilled(self, life: Life, replica: Replica, handoff: KVHandoff) -> None:
        life.phase, life.handoff = "bridge", handoff
        self._dispatch.admission.arrive(life.attempt_id, replica.id)
        self._attempts.fail_unreachable(replica)

    def _joined(self, event: Joined, now: float) -> None:
        time_ns = time.time_ns()
        transports = event.transports or [""] * len(event.request_ids)
        waits = event.waited_s or [0.0] * len(event.request_ids)
        for attempt_id, seconds, num_bytes, transport, waited_s in zip(
            event.request_ids, event.transfer_s, event.transfer_bytes, transports, waits, strict=True
        ):
            life = self._lives.of_attempt(attempt_id)
            if life is None:
                continue
            if transport:
                self._count_transfer(transport, num_bytes, seconds)
                self._observe("distserve:kv_transfer_wait_seconds", [waited_s], (("transport", transport),))
            life.prefill_replica = None  # nothing of it is there any more
            timeline = life.client.timeline
            if not life.has_decoded:
                timeline.decode_joined_ns = time_ns
                timeline.kv_transfer_ns, timeline.kv_transfer_bytes = int(seconds * 1e9), num_bytes
            if num_bytes and (reader := self._fleet.get(timeline.decode_replica)) is not None:
                reader.handoffs.observe(num_bytes, now - life.submitted_s)
                # Blocks that were there already did not come; of all others the whole did.
                num_blocks = -(-(life.num_tokens - 1) // self._dispatch.admission.block_size)
                num_tokens = num_blocks * self._dispatch.admission.block_size
                reader.kv_token_bytes = max(reader.kv_token_bytes, num_bytes / num_tokens)
            life.deliver()

    def _swapped(self, replica: Replica, report: SwapReport) -> None:
        replica.num_swapped_seqs = report.num_swapped_seqs
        replica.num_free_host_blocks = report.num_free_host_blocks
        self._attempts.count_preemptions("swap", report.num_preemptions)
        for direction, num_bytes, seconds in (
            ("out", report.bytes_out, report.out_s),
            ("in", report.bytes_in, report.in_s),
        ):
            labels = (("direction", direction),)
            self._totals["distserve:swap_bytes_total", labels] += num_bytes
            self._observe("distserve:swap_time_seconds", seconds, labels)

    def _count_transfer(self, transport: str, num_bytes: int, seconds: float) -> None:
        if transport:
            labels = (("transport", transport),)
            self._totals["distserve:kv_transfer_bytes_total", labels] += num_bytes
            self._observe("distserve:kv_transfer_time_seconds", [seconds], labels)
