"""What replicas will take, by their estimators and by what the router knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from ensemble.config import Deployment
from ensemble.request import Request
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.lives import Life, Lives
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.estimates import OutputEstimate
from ensemble.scheduling.estimator import StepShape, prompt_keys
from ensemble.scheduling.placement import NO_WORK, Site, Work, chunk_beside, smallest
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefix_index import PrefixIndex
from ensemble.scheduling.roles import Pressure

STALE_S = 0.05  # after which a replica is looked at again: what prompts take of its time changes by itself
DEFAULT_TTFT_S = 1.0  # edf's deadline, and roles' measure, where there is no target


@dataclass(slots=True)
class _Standing:
    """What the router knows of a replica, as long as it says nothing and is told nothing."""

    num_seqs: int  # that decode there, running or not
    rows: StepShape  # those that run
    target_s: float | None  # the smallest ITL target among them
    keeps_gaps: bool  # whether one is of each gap, not of the mean
    num_tokens: int  # of prompts that it has been sent
    num_keys: int  # that those attend to
    num_prompts: int  # of those
    seen_s: float
    sites: dict[tuple[int, int], Site] = field(default_factory=dict)  # powers of two of where prompts begin, and of its
    # share of the queue |->


@dataclass(eq=False)
class Predictions:
    """Changes nothing. What it found holds until `look_again`."""

    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _prefill: PrefillScheduler
    _admission: DecodeAdmission
    _output_estimate: OutputEstimate
    _prefixes: PrefixIndex
    _standings: dict[int, _Standing] = field(default_factory=dict)  # replica |->, until something changes there
    _works: dict[int, dict[int, Work]] = field(default_factory=dict)  # attempt |-> tokens that are cached |->, as long
    _block_s: float | None = None  # in which decode frees a block, until something changes
    _tokens_per_s: float = 0.0  # of prompts, for each of those that are there for them
    _tokens_per_s_each: float = 0.0  # for each of all replicas
    up_ones: list[Replica] = field(default_factory=list)
    now: float = 0.0
    num_queued: float = 0.0  # prompts that wait for each that is there for prompts, and have room to decode
    pace: float = inf  # prompt tokens for a token of the answers, where others wait until some have ended
    has_targets: bool = False  # whether a request ever came with an ITL target of its own

    def look_again(self, now: float) -> None:
        """Time has passed, and things have happened. What has to do with a replica was told by `forget`."""
        self.now = now
        self.up_ones = self._fleet.up_ones()
        tokens_per_s = self._prefill.tokens_per_s(now)
        self._tokens_per_s = tokens_per_s / max(1, sum(each.takes_prompts for each in self.up_ones))
        self._tokens_per_s_each = tokens_per_s / max(1, len(self.up_ones))
        self._look_at_queue()
        self._works.clear()
        self._block_s = None

    def _look_at_queue(self) -> None:
        """Who has no room to decode waits until an answer ends, however soon its prompt were computed."""
        num_waiting, num_output_tokens = self._prefill.num_waiting, self._output_estimate.mean_num_tokens
        self.num_queued, self.pace = self._prefill.num_waiting_each, inf
        if num_waiting and num_output_tokens:
            prompt_len = self._prefill.num_waiting_tokens / num_waiting
            num_free_tokens = self._admission.decoders.num_free_blocks * self._deployment.block_size
            fitting_share = num_free_tokens / (prompt_len + num_output_tokens) / num_waiting
            if fitting_share < 1:
                self.num_queued, self.pace = fitting_share * self.num_queued, prompt_len / num_output_tokens

    def forget(self, replica_id: int, *, frees_blocks: bool = True) -> None:
        """Something has changed there: it has said something, or been told."""
        self._standings.pop(replica_id, None)
        if frees_blocks:
            self._block_s = None

    def site(self, replica: Replica, work: Work = NO_WORK) -> Site:
        """As it is, if this prompt comes to those that it has; near enough: those are one that begin, on average, at
        positions with the same power of two, before a queue with the same one."""
        known = self._standing(replica)
        start = (known.num_keys + work.num_keys) // max(1, known.num_tokens + work.num_tokens)
        num_queued = self.num_queued
        key = start.bit_length(), int(num_queued).bit_length()
        site = known.sites.get(key)
        if site is None:
            site = known.sites[key] = self._site(replica, known, start, num_queued)
        return site

    def _site(self, replica: Replica, known: "_Standing", start: int, num_queued: float) -> Site:
        rows, num_prompts = known.rows, known.num_prompts + num_queued + 1
        one_more = StepShape(0, 0, rows.num_rows + 1, rows.num_row_keys)
        return Site(
            replica.id,
            replica.estimator,
            self._chunk_len(replica, known, rows, start, num_prompts),
            self._chunk_len(replica, known, one_more, start, num_prompts),
            start,
            known.num_tokens,
            known.num_keys,
            rows,
            known.target_s if rows.num_rows else None,
            self._prompt_load(replica),
            self._prompt_tokens_per_s(replica),
            self._deployment.prefill.max_num_batched_tokens if replica.role == "prefill" else 0,
            self._num_places(replica),
        )

    def _standing(self, replica: Replica) -> "_Standing":
        known = self._standings.get(replica.id)
        if known is None or self.now - known.seen_s > STALE_S:
            num_unfinished = len(set(self._prefill.unfinished(replica.id)))
            num_seqs = self._admission.decoders.num_seqs(replica.id)
            if replica.role != "prefill":
                num_seqs -= num_unfinished
            known = self._standings[replica.id] = _Standing(
                max(0, num_seqs),
                self._rows(replica, num_seqs),
                *self._itl_target_of(replica),
                *self._prefill.backlog(replica.id),
                num_unfinished,
                self.now,
            )
        return known

    def _prompt_load(self, replica: Replica) -> float:
        """Share of the replica's time that prompts would take, did those replicas alone compute them that are to."""
        if replica.role == "decode":
            return 0.0
        full_len = self._deployment.prefill.max_num_batched_tokens
        step_s = replica.estimator.seconds(StepShape().with_chunk(0, full_len))
        return min(1.0, self._tokens_per_s * step_s / full_len)

    def _prompt_tokens_per_s(self, replica: Replica) -> float:
        """Its share of those that come: of all replicas alike, unless prompts are kept apart from who only decodes."""
        scheduler = self._deployment.scheduler
        if scheduler.roles == "auto" and not scheduler.keeps_gaps:
            return self._tokens_per_s_each
        return 0.0 if replica.role == "decode" else self._tokens_per_s

    def work(self, replica: Replica, life: Life) -> Work:
        start = self._prefixes.num_cached_tokens(replica.id, life.hashes, life.attempt.prefill_len)
        return self.work_from(life, start)

    def work_from(self, life: Life, start: int) -> Work:
        """Where so many tokens are cached."""
        request = life.attempt
        works = self._works.setdefault(request.request_id, {})
        if start not in works:
            prefill_len = request.prefill_len
            num_tokens, num_output_tokens = prefill_len - start, self._output_estimate.num_output_tokens(request)
            works[start] = Work(num_tokens, prompt_keys(start, num_tokens), prefill_len, num_output_tokens)
        return works[start]

    def rows(self, replica: Replica) -> StepShape:
        """The sequences that a step of the replica decodes, as far as the router knows: of a pipeline's a part."""
        return self._standing(replica).rows

    def num_seqs(self, replica: Replica) -> int:
        """Sequences that decode there, running or waiting for their turn."""
        return self._standing(replica).num_seqs

    def _rows(self, replica: Replica, num_seqs: int) -> StepShape:
        num_rows = max(0, min(num_seqs, self._deployment.stage(replica.home).max_num_seqs))
        num_rows = -(-num_rows // self._num_places(replica))
        return StepShape(0, 0, num_rows, round(num_rows * replica.mean_context_len))

    def _num_places(self, replica: Replica) -> int:
        """Of its pipeline."""
        return self._deployment.stage(replica.home).pipeline_parallel_size

    def _token_s(self, replica: Replica) -> float:
        """Between two tokens of each of its sequences, without prompts."""
        return self._num_places(replica) * replica.estimator.seconds(self.rows(replica))

    def _itl_target_of(self, replica: Replica) -> tuple[float | None, bool]:
        """The smallest ITL target of its sequences, or where it has none the deployment's; whether one is of gaps."""
        scheduler = self._deployment.scheduler
        if not self.has_targets:
            return scheduler.itl_target_s, scheduler.keeps_gaps
        lives = (self._lives.of_attempt(attempt_id) for attempt_id in self._admission.decoders.request_ids(replica.id))
        requests = [life.attempt for life in lives if life is not None]
        target_s = smallest([each.itl_target_s for each in requests] or [None], scheduler.itl_target_s)
        keep_gaps = [scheduler.keeps_gaps if each.itl_target_s is None else each.keeps_gaps for each in requests]
        return target_s, any(keep_gaps) if requests else scheduler.keeps_gaps

    def _chunk_len(self, replica: Replica, known: "_Standing", rows: StepShape, start: int, num_prompts: float) -> int:
        """Prompt tokens from `start` on that its steps take beside these sequences, as its loop will find too, unless
        so many prompts come that the mean of its steps has nothing to spare.
        """
        if not rows.num_rows:
            return self._deployment.prefill.max_num_batched_tokens
        target_s = None if known.target_s is None else known.target_s / self._num_places(replica)
        max_len = self._deployment.num_prompt_tokens_beside
        adapts = self._deployment.scheduler.roles == "auto"
        spare_s = 0.0 if known.keeps_gaps else inf
        steps, pace = replica.estimator, self.pace
        return chunk_beside(
            steps, rows, start, target_s, max_len, num_prompts, adapts=adapts, spare_s=spare_s, pace=pace
        )

    def wait_for_blocks_s(self, num_blocks: int) -> float:
        """Until the replicas that decode have freed so many: outputs end evenly, as many as there are in their time."""
        if num_blocks <= 0:
            return 0.0
        if self._block_s is None:
            self._block_s = self._seconds_of_block()
        return num_blocks * self._block_s

    def _seconds_of_block(self) -> float:
        readers = [replica for replica in self.up_ones if replica.takes_sequences]
        num_held = sum(replica.credits.num_blocks - replica.credits.free_blocks for replica in readers)
        if not num_held:
            return 0.0
        num_output_tokens = self._output_estimate.mean_num_tokens
        if num_output_tokens is None:
            lengths = [life.attempt.sampling.max_tokens for life in self._lives]
            num_output_tokens = sum(lengths) / max(1, len(lengths))
        step_s = max(self._token_s(replica) for replica in readers)
        return num_output_tokens * step_s / num_held

    def queue_s(self, computing: Sequence[Replica]) -> float:
        """Until all who wait now have started, shared by all who compute prompts."""
        num_tokens, num_waiting = self._prefill.num_waiting_tokens, self._prefill.num_waiting
        if not num_waiting:
            return 0.0
        num_keys = num_waiting * prompt_keys(0, num_tokens // num_waiting)
        alone = [
            site.steps.seconds_of_prompts(num_tokens, num_keys, site.chunk_len, site.rows)
            for site in map(self.site, computing)
        ]
        return 1 / sum(1 / max(seconds, 1e-9) for seconds in alone) if alone else 0.0

    def pressure(self, computing: Sequence[Replica]) -> Pressure:
        """What each side bears: the wait of a prompt that came now over its target, and decode's KV and step times."""
        scheduler = self._deployment.scheduler
        prefilling = [replica for replica in self.up_ones if replica.takes_prompts]
        waits_s = [self.site(replica).until_computed(NO_WORK) for replica in prefilling]
        prefill = (self.queue_s(computing) + min(waits_s, default=0.0)) / (scheduler.ttft_target_s or DEFAULT_TTFT_S)
        decoding = [replica for replica in self.up_ones if replica.takes_sequences]
        num_blocks = sum(replica.credits.num_blocks for replica in decoding)
        num_held = sum(
            replica.credits.num_blocks
            - replica.credits.free_blocks
            - sum(replica.credits.held(each) for each in set(self._prefill.unfinished(replica.id)))  # prefill's load
            for replica in decoding
        )
        decode = (num_held + self._admission.num_promised_blocks) / max(1, num_blocks)
        if scheduler.itl_target_s is not None and decoding:
            step_s = sum(self._token_s(replica) for replica in decoding) / len(decoding)
            decode = max(decode, step_s / scheduler.itl_target_s)
        return Pressure(prefill, decode)

    def num_cached_tokens(self, replica_id: int, request: Request) -> int:
        life = self._lives.of_attempt(request.request_id)
        return 0 if life is None else self._prefixes.num_cached_tokens(replica_id, life.hashes, request.prefill_len)
