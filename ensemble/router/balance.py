"""Running sequences go over, with their KV, from replicas where tokens come slowly to others: with roles `auto`."""

from collections.abc import Iterator
from dataclasses import dataclass

from ensemble.config import Deployment
from ensemble.protocol.router_replica import HandOff
from ensemble.router.dispatch import Dispatch
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Life, Lives
from ensemble.scheduling.balance import LEAST_GAIN_S, Side, gain_s, is_slower, keeps_targets
from ensemble.scheduling.placement import smallest

INTERVAL_S = 0.1  # between two looks
SETTLE_S = 1.0  # in which a sequence that has come, or was asked to go in vain, stays


@dataclass(eq=False)
class Balance:
    """One sequence at a time is under way. As long as requests wait, those even replicas out by where they go."""

    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _dispatch: Dispatch
    _due: float = 0.0
    _moving: int = 0  # attempt id of who was told last

    def tick(self, now: float) -> None:
        if self._deployment.scheduler.roles != "auto" or now < self._due:
            return
        self._due = now + INTERVAL_S
        life = self._lives.of_attempt(self._moving)
        is_under_way = life is not None and (life.moves_to is not None or life.prefill_replica is not None)
        if is_under_way or self._dispatch.prefill.num_waiting or self._dispatch.admission.num_bridge_seqs:
            return
        best = max(self._moves(now), key=lambda move: move[0], default=None)
        if best is not None and best[0] >= LEAST_GAIN_S:
            self.move(*best[1:])

    def move(self, life: Life, reader: Replica) -> None:
        """Tells the replica where it decodes to hand it off. What is not running there then stays."""
        source = self._fleet.get(life.decode_replica) if life.decode_replica is not None else None
        assert source is not None, "a sequence decodes at a replica of the fleet"
        self._moving, life.moves_to = life.attempt_id, reader.id
        self._dispatch.command(source, HandOff(request_ids=[life.attempt_id]))

    def _moves(self, now: float) -> Iterator[tuple[float, Life, Replica]]:
        """Seconds that each one gains. Of a replica goes the sequence that is expected to have most tokens to come."""
        ways, may_move = self._dispatch.ways, self._dispatch.admission.may_move
        decoding = [each for each in self._fleet.up_ones() if each.takes_sequences or ways.is_spare(each)]
        sides = [(replica, self._side(replica)) for replica in decoding]
        for source, busy in sides:
            context_len = busy.site.rows.num_row_keys // max(1, busy.site.rows.num_rows)
            readers = [each for each in sides if busy.num_seqs and is_slower(busy, each[1], context_len)]
            candidates = self._candidates(source.id, now) if readers else []
            num_tokens, life = max(candidates, key=lambda each: each[0], default=(0, None))
            for reader, other in readers:
                if life is not None and may_move(life.attempt, source.id, reader.id):
                    yield self._gain_s(busy, other, life, num_tokens, reader), life, reader

    def _side(self, replica: Replica) -> Side:
        site, num_seqs = self._dispatch.predictions.site(replica), self._dispatch.predictions.num_seqs(replica)
        num_running = site.rows.num_rows * site.num_places
        return Side(site, num_seqs, max(replica.num_swapped_seqs, num_seqs - num_running))

    def _candidates(self, source_id: int, now: float) -> list[tuple[int, Life]]:
        """Sequences that decode there, with the tokens that they are expected to have to come."""
        lives = (self._lives.of_attempt(each) for each in self._dispatch.decoders.request_ids(source_id))
        return [
            (self._dispatch.output_estimate.num_more_tokens(life.attempt, len(life.output_token_ids)), life)
            for life in lives
            if life is not None
            and life.phase == "decode"
            and life.prefill_replica is None
            and not life.is_alone
            and now - life.submitted_s >= SETTLE_S
        ]

    def _gain_s(self, busy: Side, other: Side, life: Life, num_tokens: int, reader: Replica) -> float:
        """Less what the move costs; minus infinity: a target forbids it."""
        handoff_s = reader.handoffs.seconds(round(life.num_tokens * reader.kv_token_bytes))
        gap_s = handoff_s + busy.token_s() if reader.handoffs.has_samples else None
        target_s = smallest([life.attempt.itl_target_s], self._deployment.scheduler.itl_target_s)
        if not keeps_targets(busy, other, life.num_tokens, target_s, gap_s):
            return float("-inf")
        return gain_s(busy, other, life.num_tokens, num_tokens) - handoff_s
