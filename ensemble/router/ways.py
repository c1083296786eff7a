"""Which way a request takes: which replica computes its prompt, and whether it stays there."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ensemble.config import Deployment
from ensemble.errors import TargetOutOfReach
from ensemble.request import Request
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Life, Lives
from ensemble.router.predictions import DEFAULT_TTFT_S, Predictions
from ensemble.router.prefix_moves import Offer, PrefixMoves
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.placement import NO_WORK, Reader, Site, Way, Work, best, hand_off, num_missed, smallest, stay
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefiller import Limits

# Where sequences run too, a step is launched before the one before is read, and told then. Steps take whole tiles, so
# one may end just short of its batch, which is in flight for another step: with three, on H100, each fifth step beside
# sequences found the last 3 tokens of its batch, and no other.
MAX_BATCHES_BESIDE = 4
MAX_QUEUED = 8  # prompts for each replica: where more have room and wait, none of them waits for a replica that is busy


class _Choice(NamedTuple):
    way: Way
    offer: Offer | None  # a prefix that is to be fetched first


@dataclass(eq=False)
class Ways:
    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _prefill: PrefillScheduler
    _admission: DecodeAdmission
    _predictions: Predictions
    _prefix_moves: PrefixMoves
    # for the attempt asked of last, as long as it holds: what is open to it, and the best of that
    _chosen: tuple[int, list[_Choice], _Choice | None] | None = None
    _refused: list[tuple[Life, TargetOutOfReach]] = field(default_factory=list)
    _alone: set[int] = field(default_factory=set)  # attempt ids

    def __post_init__(self) -> None:
        self._is_auto = self._deployment.scheduler.roles == "auto"
        self._may_miss = self._deployment.scheduler.on_missed_target != "refuse"
        self._beside = Limits(self._deployment.num_prompt_tokens_beside, MAX_BATCHES_BESIDE, stays=True)

    def look_again(self) -> None:
        """What was chosen holds no more: time has passed, or something has started."""
        self._chosen = None

    def take_refused(self) -> list[tuple[Life, TargetOutOfReach]]:
        """Who is to be refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    # ---- who has to be alone

    def set_alone(self, attempt_id: int) -> None:
        self._alone.add(attempt_id)

    def clear_alone(self, attempt_id: int) -> None:
        self._alone.discard(attempt_id)

    def _may_share(self, replica_id: int, life: Life) -> bool:
        """Whether the prompts that the replica computes, and this one, are none that has to be alone."""
        computed = self._prefill.unfinished(replica_id)
        return not computed if life.is_alone else self._alone.isdisjoint(computed)

    # ---- what each replica computes

    def computing(self) -> list[Replica]:
        return [replica for replica in self._fleet.up_ones() if self.prompt_limits(replica) is not None]

    def is_spare(self, replica: Replica) -> bool:
        """Whether it may decode what it has computed, though its role is to hand off."""
        return self._is_auto and replica.takes_prompts and replica.role == "prefill"

    def _decodes_too(self, replica: Replica) -> bool:
        return self.is_spare(replica) and self._admission.decoders.num_seqs(replica.id) > 0

    def prompt_limits(self, replica: Replica) -> Limits | None:
        decode = self._deployment.decode
        if replica.takes_prompts and replica.role == "prefill":
            return self._prefill.limits
        if replica.takes_prompts:
            return self._beside
        if replica.takes_sequences and self._is_auto:
            return self._beside
        if replica.takes_sequences and decode.local_prefill_tokens:
            return Limits(decode.local_prefill_tokens, MAX_BATCHES_BESIDE, decode.max_local_prompt_len, stays=True)
        return None

    def limits_now(self, replica_id: int, limits: Limits) -> Limits:
        """A batch is what a step takes; beside running sequences one more is under way."""
        replica = self._fleet.get(replica_id)
        if replica is None or not self._predictions.rows(replica).num_rows:
            return limits
        chunk_len = self._predictions.site(replica).chunk_len
        num_tokens = min(limits.max_num_batched_tokens, chunk_len)
        return Limits(num_tokens, MAX_BATCHES_BESIDE, limits.max_prompt_len, limits.stays)

    # ---- the choice

    def may_start(self, replica_id: int, request: Request) -> bool:
        life, replica = self._lives.of_attempt(request.request_id), self._fleet.get(replica_id)
        if life is None or replica is None:
            return False
        if self._chosen is None or self._chosen[0] != request.request_id:
            open_to_it = [_Choice(*each) for each in self._ways(life)]
            self._chosen = request.request_id, open_to_it, self._best_of(life, open_to_it)
        _, choices, choice = self._chosen
        if choice is None or self._refuses(life, choice.way):
            return False
        if choice.way.replica != replica_id and self._predictions.num_queued > MAX_QUEUED:
            here = self._best_of(life, [each for each in choices if each.way.replica == replica_id])
            if here is not None and not self._misses(life, here.way):
                choice = here
        way, offer = choice
        if way.replica != replica_id or (way.stays and not self._admission.try_start_at(replica_id, request)):
            return False
        if not way.stays:  # there is room for it, or will be soon enough: else this was no way
            self._admission.promise(request)
        self._chosen = None
        self._predictions.forget(replica_id, frees_blocks=way.stays)
        life.started(replica_id, stays=way.stays)
        life.submitted_s = self._predictions.now
        if offer is not None:
            self._prefix_moves.begin(life, replica, offer, self._predictions.now)
        timeline = life.client.timeline
        if not timeline.predicted_first_token_ns:
            timeline.predicted_first_token_ns = time.time_ns() + int(way.ttft_s * 1e9)
        return True

    def _best_of(self, life: Life, choices: list[_Choice]) -> _Choice | None:
        """None: nobody could start it, were it idle."""
        way = self._best(life, (each.way for each in choices))
        return next((each for each in choices if each.way is way), None)

    def _best(self, life: Life, ways: Iterable[Way]) -> Way | None:
        left_s, itl_target_s = self._left_s(life), self._targets(life)[1]
        gaps_within_s: float | None = None
        waited_s = self._predictions.now - life.arrived_s
        if self._deployment.scheduler.keeps_gaps or life.request.keeps_gaps:
            gaps_within_s = DEFAULT_TTFT_S - waited_s if left_s is None else left_s
        return best(ways, left_s, itl_target_s, gaps_within_s, waited_s=waited_s)

    def _ways(self, life: Life) -> Iterator[tuple[Way, Offer | None]]:
        """Those that are open now, or will be when the replica has run a batch; of equals who only prefills first."""
        request, up_ones = life.attempt, self._predictions.up_ones
        order = {"prefill": 0, "mixed": 1, "decode": 2}
        prefill_len = request.prefill_len
        num_blocks = -(-prefill_len // self._deployment.block_size)
        may_promise = self._admission.may_start(request)
        readers = self._readers(life) if may_promise and request.sampling.max_tokens > 1 else []
        cached: dict[int, int] = {}  # replica |-> tokens of the prompt, where any of it is anywhere
        if self._prefix_moves.may_offer(life):
            cached = {each.id: self._predictions.num_cached_tokens(each.id, request) for each in up_ones}
        for replica in sorted(up_ones, key=lambda replica: order[replica.role]):
            limits = self.prompt_limits(replica)
            if limits is None or (limits.max_prompt_len or prefill_len) < prefill_len:
                continue
            if self._alone and not self._may_share(replica.id, life):
                continue
            may_stay = (limits.stays or self.is_spare(replica)) and self._admission.may_start_at(replica.id, request)
            may_leave = replica.role != "decode" and may_promise and replica.credits.fits(num_blocks)
            if may_leave and self._decodes_too(replica):  # what waited there for others would hold the blocks it needs
                may_leave = not self._admission.num_lacking_blocks(request, without_spare=True)
            if not (may_stay or may_leave):
                continue
            work = self._predictions.work(replica, life)
            for way in self._ways_at(replica, life, work, readers, may_stay, may_leave):
                yield way, None
            offer = self._prefix_moves.offer(replica, up_ones, cached) if cached else None
            if offer is not None:
                later_s = max(0.0, offer.seconds - self._predictions.site(replica).until_computed(NO_WORK))
                less = self._predictions.work_from(life, offer.num_tokens)
                for way in self._ways_at(replica, life, less, readers, may_stay, may_leave):
                    yield way.later(later_s), offer

    def _ways_at(
        self,
        replica: Replica,
        life: Life,
        work: Work,
        readers: list[tuple[Replica, Reader]],
        may_stay: bool,
        may_leave: bool,
    ) -> Iterator[Way]:
        request, site = life.attempt, self._predictions.site(replica, work)
        if may_stay:
            yield stay(site, work)
        if not may_leave:
            return
        if request.sampling.max_tokens == 1:
            yield stay(site, work)._replace(stays=False)
        elif way := hand_off(site, work, self._readers_of(replica, readers, site, work, request)):
            yield way

    def _readers(self, life: Life) -> list[tuple[Replica, Reader]]:
        """Who may decode what others compute."""
        request = life.attempt
        wait_s = self._predictions.wait_for_blocks_s(self._admission.num_lacking_blocks(request, without_spare=True))
        takers = [replica for replica in self._predictions.up_ones if replica.takes_sequences]
        readers = []
        for replica in takers:
            work = self._predictions.work(replica, life)
            handoff_s = replica.handoffs.seconds(round(work.num_tokens * replica.kv_token_bytes))  # the rest is there
            num_promised = self._admission.num_promised_seqs / len(takers)
            readers.append((replica, Reader.of(self._predictions.site(replica), work, handoff_s, wait_s, num_promised)))
        return readers

    def _readers_of(
        self, source: Replica, readers: list[tuple[Replica, Reader]], site: Site, work: Work, request: Request
    ) -> list[Reader]:
        """A mixed replica hands off only to those that do nothing but decode; itself, if there is nobody else."""
        others = [
            (source.id, replica.id)
            for replica, _ in readers
            if replica.id != source.id and (source.role == "prefill" or replica.role == "decode")
        ]
        if self.is_spare(source):
            others = [pair for pair in others if pair not in self._admission.decoders.unreachable]
            if not others:
                has_room = self._admission.blocks_for(request) <= source.credits.num_blocks
                return [Reader.of(site, work, 0.0)] if has_room else []
        return [reader for replica, reader in readers if (source.id, replica.id) in others]

    # ---- targets

    def _targets(self, life: Life) -> tuple[float | None, float | None]:
        """TTFT and ITL, in seconds; None: there is none."""
        scheduler, ttft_s = self._deployment.scheduler, life.client.hints.ttft_target_s
        return scheduler.ttft_target_s if ttft_s is None else ttft_s, smallest(
            [life.request.itl_target_s], scheduler.itl_target_s
        )

    def _left_s(self, life: Life) -> float | None:
        """Of its TTFT target."""
        ttft_target_s = self._targets(life)[0]
        return None if ttft_target_s is None else life.arrived_s + ttft_target_s - self._predictions.now

    def _misses(self, life: Life, way: Way) -> bool:
        """A target."""
        return num_missed(way, self._left_s(life), self._targets(life)[1]) > 0

    def _refuses(self, life: Life, way: Way) -> bool:
        """Whether it has to be refused now, since nothing of it is computed yet and it is going to miss a target."""
        if self._may_miss or life.attempt is not life.request:
            return False
        if not self._misses(life, way):
            return False
        ttft_target_s, itl_target_s = self._targets(life)
        if all(life is not each for each, _ in self._refused):
            waited_s = self._predictions.now - life.arrived_s
            error = _out_of_reach(waited_s + way.ttft_s, way.itl_s, ttft_target_s, itl_target_s)
            self._refused.append((life, error))
        return True

    def check_targets(self, life: Life, now: float) -> None:
        """Raises TargetOutOfReach where requests are refused that will miss one, behind all that wait."""
        if self._may_miss:
            return
        self._predictions.look_again(now)
        way = self._best(life, (way for way, _ in self._ways(life)))
        if way is None:
            return
        ttft_target_s, itl_target_s = self._targets(life)
        ttft_s = way.ttft_s + (
            self._predictions.queue_s(self.computing()) if self._deployment.scheduler.policy == "fcfs" else 0.0
        )
        if num_missed(way._replace(ttft_s=ttft_s), ttft_target_s, itl_target_s):
            raise _out_of_reach(ttft_s, way.itl_s, ttft_target_s, itl_target_s)


def _out_of_reach(
    ttft_s: float, itl_s: float, ttft_target_s: float | None, itl_target_s: float | None
) -> TargetOutOfReach:
    if ttft_target_s is not None and ttft_s > ttft_target_s:
        return TargetOutOfReach("ttft_target_ms", ttft_target_s, ttft_s, ttft_s - ttft_target_s)
    return TargetOutOfReach("itl_target_ms or tpot_target_ms", itl_target_s or 0.0, itl_s, 1.0)
