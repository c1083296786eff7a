"""An attempt's end, and the next one: what replicas lose or give up is prefilled again, what cannot go on is failed."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ensemble.config import Deployment, StageName
from ensemble.errors import DistServeError, StageUnavailable
from ensemble.operator_log import tell_operator
from ensemble.protocol.router_replica import AttachFailed, CancelRequests, HandedOff, HandOff, Preempted
from ensemble.router.dispatch import Dispatch
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.gauges import Totals
from ensemble.router.lives import Life, Lives

DEATHS_BEFORE_ALONE = 2  # in a row, after which a request is tried again alone


@dataclass(eq=False)
class Attempts:
    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _dispatch: Dispatch
    _totals: Totals
    _new_id: Callable[[], int]  # of attempts; the first attempt's id is the request's own

    def lost(self, attempt_id: int, replica: Replica, reason: str, now: float) -> None:
        """A dead replica had something of this attempt."""
        life = self._lives.of_attempt(attempt_id)
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
            self.fail(life, StageUnavailable(stage, f"{reason}, again while it had this request alone"))
            return
        life.is_alone = life.num_deaths >= DEATHS_BEFORE_ALONE
        self.recover(life, "death", now)

    def recover(self, life: Life, cause: str, now: float) -> None:
        """What was computed is lost, or given up: the request is prefilled again, with what its client has."""
        self._totals["distserve:recoveries_total", (("cause", cause),)] += 1
        life.client.timeline.num_recoveries += 1
        self._begin_again(life, now)

    def preempted(self, replica: Replica, event: Preempted, now: float) -> None:
        """The replica has given sequences up for others, and their blocks are free: they are prefilled again."""
        self._dispatch.released(replica, event.request_ids, event.num_free_blocks)
        for attempt_id in event.request_ids:
            life = self._lives.of_attempt(attempt_id)
            if life is not None:
                self.count_preemptions("recompute", 1)
                life.client.timeline.num_preemptions += 1
                self._begin_again(life, now)

    def move(self, replica: Replica, now: float) -> None:
        """Nothing that the replica has is to wait for its end there: what runs goes over, with its KV, if there is a
        reader; the rest is computed again."""
        attempt_ids = []
        for attempt_id in replica.credits.request_ids:
            life = self._lives.of_attempt(attempt_id)
            if life is None or replica.id not in (life.prefill_replica, life.decode_replica):
                continue
            may_leave = self._dispatch.admission.may_leave(life.attempt, replica.id)
            if may_leave and life.phase == "decode" and life.decode_replica == replica.id:
                attempt_ids.append(attempt_id)
            elif life.phase != "bridge" or not may_leave:
                self.recover(life, "drain", now)
        if attempt_ids:
            self._dispatch.command(replica, HandOff(request_ids=attempt_ids))

    def handed_off(self, replica: Replica, event: HandedOff, now: float) -> None:
        """Sequences decode there no more; some cannot leave with their KV, and are computed again."""
        for attempt_id in event.stay:
            life = self._lives.of_attempt(attempt_id)
            if life is None or life.decode_replica != replica.id:
                continue
            if life.moves_to is None:
                self.recover(life, "drain", now)
            elif life.prefill_replica is None:
                life.submitted_s = now  # others are asked first
            life.moves_to = None
        for handoff in event.handoffs:
            life = self._lives.of_attempt(handoff.request_id)
            if life is None:
                continue  # it was cancelled meanwhile: the replica was told, and ends the lease
            if not self._dispatch.admission.may_leave(life.attempt, replica.id):
                self.recover(life, "drain", now)
                continue
            self._release_everywhere(life.attempt_id, but=replica.id)  # what is told of its lease before may be lost
            so_far = msgspec.structs.replace(life.attempt, resumed_token_ids=list(life.output_token_ids))
            self._dispatch.admission.leave(so_far, replica.id)  # who is left is longer than was expected
            life.phase, life.handoff, life.prefill_replica, life.decode_replica = "bridge", handoff, replica.id, None
            reader, life.moves_to = life.moves_to, None
            self._totals["distserve:moves_total", (("cause", "drain" if reader is None else "balance"),)] += 1
            if reader is not None and not self._dispatch.move(life, reader):
                self._dispatch.move(life, replica.id)  # there is no room any more: it goes on where it is

    def count_preemptions(self, by: str, number: int) -> None:
        self._totals["vllm:num_preemptions_total", ()] += number
        self._totals["distserve:preemptions_total", (("by", by),)] += number

    def _begin_again(self, life: Life, now: float) -> None:
        self.give_up(life)
        self._lives.begin_again(life, self._new_id())
        try:
            self._dispatch.enqueue(life, now, is_again=True)
            limit = self._dispatch.prefill.max_prompt_len
            if limit is not None and life.attempt.prefill_len > limit:
                raise StageUnavailable("prefill", f"{life.attempt.prefill_len} tokens to compute again fit no pool")
        except DistServeError as error:
            self.fail(life, error)

    def give_up(self, life: Life) -> None:
        """Takes the attempt out of the schedulers, and has its blocks freed wherever it has any."""
        attempt_id = life.attempt_id
        self._dispatch.ended(attempt_id)
        self._dispatch.prefill.cancel(attempt_id)
        self._dispatch.admission.withdraw(attempt_id)
        if life.phase != "answering":  # else the replicas have ended it themselves
            self._release_everywhere(attempt_id)

    def _release_everywhere(self, attempt_id: int, *, but: int | None = None) -> None:
        for replica in self._fleet.up_ones():
            if attempt_id in replica.credits and replica.id != but:
                self._dispatch.command(replica, CancelRequests(request_ids=[attempt_id]))

    def attach_failed(self, reader: Replica, failed: AttachFailed, now: float) -> None:
        source = next((each for each in self._fleet.up_ones() if each.peer_address == failed.address), None)
        if source is None:
            return  # it has died: its end is told, or will be
        if (source.id, reader.id) not in self._dispatch.decoders.unreachable:
            tell_operator(f"replica {reader.id} cannot map the KV pool of replica {source.id}: {failed.reason}")
        self._dispatch.decoders.cannot_reach(source.id, reader.id)
        self._dispatch.prefix_moves.attach_failed(source, reader)
        source.down_reason = f"replica {reader.id} cannot map the KV pool of replica {source.id}: {failed.reason}"
        for attempt_id in failed.request_ids:
            life = self._lives.of_attempt(attempt_id)
            if life is not None and not self._dispatch.decoders.is_reachable_from(source.id):
                self._cannot_leave(life, source)
            elif life is not None:
                self.recover(life, "unreachable", now)
        self.fail_unreachable(source)

    def pulls_failed(self, reader: Replica, reasons: dict[int, str], now: float) -> None:
        """The prompt is computed again, `max_recoveries` times at most."""
        for attempt_id, reason in reasons.items():
            tell_operator(f"replica {reader.id} did not get a sequence's KV: {reason}")
            life = self._lives.of_attempt(attempt_id)
            if life is None:
                continue
            life.num_failed_pulls += 1
            if life.num_failed_pulls > self._deployment.scheduler.max_recoveries:
                self.fail(life, StageUnavailable("decode", f"the KV does not come: {reason}"))
            else:
                self.recover(life, "transfer", now)

    def fail_unreachable(self, source: Replica) -> None:
        """What waits in the bridge with its KV at a replica whose pool no reader can map cannot go on."""
        if self._dispatch.decoders.is_reachable_from(source.id):
            return
        for life in self._lives:
            if life.phase == "bridge" and life.prefill_replica == source.id:
                self._cannot_leave(life, source)

    def _cannot_leave(self, life: Life, source: Replica) -> None:
        """No reader can map the pool that it is in: it is computed again, unless that could be there again."""
        if source.takes_prompts:
            self.fail(life, StageUnavailable("decode", source.down_reason))
        else:
            self.recover(life, "unreachable", self._dispatch.predictions.now)

    def fail(self, life: Life, error: DistServeError) -> None:
        """Ends a live request with an error, wherever it is, and has its blocks freed."""
        self.give_up(life)
        self.remove(life)
        life.client.fail(error)

    def remove(self, life: Life) -> None:
        self._lives.remove(life)
        self._dispatch.share_prompt(life)  # as far as it was computed
