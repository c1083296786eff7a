"""Where a prompt is computed and its answer decoded: the way with the earliest end among those that keep the targets.

    hand off   a replica computes the prompt, whoever has room decodes it; its KV goes over
    stay       a replica computes the prompt beside its running sequences, and decodes it: nothing goes over

Where gaps between tokens have a target, prompts are kept apart from running sequences as long as that is fast enough:
steps with a chunk come so near to the target that one in fifty misses it, a prompt takes some ten of them, and every
sequence beside it waits for each; unless so many decode in one place that their steps alone come near to it.

What a way costs is the time to the first token, what the running sequences beside the prompt are delayed by, the
expected output's time at the speed of the replica that decodes it, and what prompts lose meanwhile where that is a
replica for prompts.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

from ensemble.scheduling.estimator import NO_STEP, StepEstimator, StepShape

MIN_CHUNK_LEN = 16  # tokens, so that prompts get on where steps are too long already
AIM = 0.9  # of an ITL target, by what nearly all steps take: the longest gap of an answer counts, and tokens have a way
MEAN_AIM = 0.97  # of a target of the mean, which later steps make up for
NUM_MEAN_STEPS = 32  # over which a target of the mean is kept: shorter answers are few, and have few gaps
LEAST_STRETCH = 1.1  # of a step by the chunk in it, where it misses its target without any
FREE_STRETCH = 1.15  # of a step by the chunk in it that is hardly felt: reading the weights hides it
LIGHT_LOAD = 0.75  # of those who compute prompts: below it a prompt that is late holds up few others
HEADROOM = 0.6  # of an ITL target: with shorter steps who decodes need not be spared by those who compute prompts
MUCH_SLOWER = 1.35  # of the steps of one replica beside another's
# Of what the TTFT target leaves beside the prompt's own time, for waiting apart: those who come behind need the rest.
APART_SHARE = 1 / 4
LONG_LEN = 512  # tokens: twice what hides reading the weights on an H100. In longer chunks the same prompts carry
# running sequences along fewer times
PACE_MARGIN = 1.2  # of chunks that keep up with the answers: prompts come in bursts, as answers end
MANY_PROMPTS = 16  # where more wait, throughput is what counts, and chunks may be longer
FIRST_WEIGHT = 3  # of who waits for a first token, against who runs: behind them wait those who are still to come
NUM_HALVES = 5  # lengths of chunks that are looked at: the longest, half of it, and so on


class Work(NamedTuple):
    """A request that is to be placed."""

    num_tokens: int  # of its prompt that are not cached
    num_keys: int  # that they attend to
    context_len: int  # of the whole prompt
    num_output_tokens: float  # as expected


NO_WORK = Work(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Site:
    """A replica that may compute the prompt."""

    replica: int
    steps: StepEstimator
    chunk_len: int  # prompt tokens of its steps now
    beside_len: int  # prompt tokens of its steps beside its sequences and one more
    mean_start: int = 0  # of the chunks
    num_backlog_tokens: int = 0  # of prompts that it has been sent
    num_backlog_keys: int = 0
    rows: StepShape = NO_STEP  # its running sequences, as many as are in a step
    target_s: float | None = None  # the smallest ITL target among them
    prompt_load: float = 0.0  # share of its time that prompts take, as they came lately
    prompt_tokens_per_s: float = 0.0  # computed beside its sequences, as prompts came lately
    full_len: int = 0  # prompt tokens of its steps without sequences, where it is there for prompts
    num_places: int = 1  # of a pipeline: so many steps are in flight, and a sequence is in one of them

    def until_computed(self, work: Work) -> float:
        """Seconds until the last token of the prompt is computed, behind those that are there."""
        num_tokens, num_keys = self.num_backlog_tokens + work.num_tokens, self.num_backlog_keys + work.num_keys
        seconds = self.steps.seconds_of_prompts(num_tokens, num_keys, self.chunk_len, self.rows)
        if self.num_places > 1 and num_tokens:  # the last step passes the other places
            last_len = min(self.chunk_len, num_tokens)
            seconds += (self.num_places - 1) * self.steps.seconds(self.rows.with_chunk(self.mean_start, last_len))
        return seconds

    def delay(self, work: Work) -> float:
        """Seconds by which the prompt holds up the running sequences."""
        if not self.rows.num_rows:
            return 0.0
        seconds = self.steps.seconds_of_prompts(work.num_tokens, work.num_keys, self.chunk_len, self.rows)
        return seconds - -(-work.num_tokens // self.chunk_len) * self.steps.seconds(self.rows)

    def itl(self, work: Work, num_promised: float = 0.0) -> float:
        """Seconds between two tokens of the answer, if it decodes here.

        num_promised: sequences like it that are on their way here.
        """
        return self.token_s(num_promised + 1, work.context_len)

    def token_s(self, num_more: float = 0.0, context_len: int = 0) -> float:
        """Seconds between two tokens of each sequence, on average, if so many come, or go: beside the prompts that are
        computed meanwhile. Those that are there are soon done: what counts is how many come."""
        num_more /= self.num_places
        num_rows = max(1, round(self.rows.num_rows + num_more))
        rows = StepShape(0, 0, num_rows, max(0, round(self.rows.num_row_keys + num_more * context_len)))
        step_s = self.steps.seconds(rows)
        if self.prompt_tokens_per_s:
            chunk_s = self.steps.seconds(rows.with_chunk(self.mean_start, self.beside_len))
            prompts_share = self.prompt_tokens_per_s * (chunk_s - step_s) / self.beside_len  # of the time
            step_s = min(chunk_s, step_s / (1 - prompts_share)) if prompts_share < 1 else chunk_s
        return self.num_places * step_s

    def lost(self, output_s: float) -> float:
        """Seconds of computing prompts that are lost by the shorter chunks beside an answer of so many seconds."""
        if not self.full_len:
            return 0.0
        one_more = StepShape(0, 0, self.rows.num_rows + 1, self.rows.num_row_keys)
        beside_s = self.steps.seconds(one_more.with_chunk(self.mean_start, self.beside_len)) / self.beside_len
        full_s = self.steps.seconds(NO_STEP.with_chunk(self.mean_start, self.full_len)) / self.full_len
        if not beside_s:
            return 0.0
        later_s = output_s / (
            self.num_places * self.rows.num_rows + 1
        )  # by which the last sequence ends later, where all are alike
        return self.prompt_load * max(0.0, 1 - full_s / beside_s) * later_s


class Reader(NamedTuple):
    """A replica that may decode what another one has computed."""

    itl_s: float  # of the answer
    target_s: float | None  # the smallest ITL target of those that it would decode with
    handoff_s: float
    wait_s: float = 0.0  # until it has room

    @classmethod
    def of(cls, site: Site, work: Work, handoff_s: float, wait_s: float = 0.0, num_promised: float = 0.0) -> "Reader":
        return cls(site.itl(work, num_promised), site.target_s, handoff_s, wait_s)


class Way(NamedTuple):
    """A way that a request can take."""

    replica: int  # that computes the prompt
    stays: bool
    ttft_s: float  # from now
    itl_s: float
    cost_s: float
    others_target_s: float | None = None  # the smallest ITL target of those that it would decode with
    is_apart: bool = False  # where nothing decodes the prompt is computed, and handed off
    slows_prompts: bool = False  # it decodes where prompts are to be computed
    prompt_load: float = 0.0  # of one apart: share of the time there that prompts take
    alone_s: float = 0.0  # of one apart: to the first token, were nothing before it

    def later(self, seconds: float) -> "Way":
        """The same, if the prompt can be computed only so much later."""
        return self._replace(ttft_s=self.ttft_s + seconds, cost_s=self.cost_s + seconds)


def stay(site: Site, work: Work) -> Way:
    computed_s, itl_s = site.until_computed(work), site.itl(work)
    output_s = work.num_output_tokens * itl_s
    cost_s = computed_s + site.delay(work) + output_s + site.lost(output_s)
    return Way(site.replica, True, computed_s, itl_s, cost_s, site.target_s, slows_prompts=site.full_len > 0)


def hand_off(site: Site, work: Work, readers: Iterable[Reader]) -> Way | None:
    """None: there is no reader."""
    computed_s, delay_s = site.until_computed(work), site.delay(work)

    def cost_s(reader: Reader) -> float:
        return max(computed_s, reader.wait_s) + reader.handoff_s + delay_s + work.num_output_tokens * reader.itl_s

    reader = min(readers, key=cost_s, default=None)
    if reader is None:
        return None
    ttft_s = max(computed_s, reader.wait_s) + reader.handoff_s
    alone_s = site.steps.seconds_of_prompts(work.num_tokens, work.num_keys, site.chunk_len, site.rows)
    return Way(
        site.replica,
        False,
        ttft_s,
        reader.itl_s,
        cost_s(reader),
        reader.target_s,
        is_apart=site.full_len > 0 and not site.rows.num_rows,
        prompt_load=site.prompt_load,
        alone_s=alone_s + reader.handoff_s,
    )


def best(
    ways: Iterable[Way],
    left_s: float | None,
    itl_target_s: float | None,
    gaps_within_s: float | None = None,
    *,
    waited_s: float = 0.0,
) -> Way | None:
    """The cheapest of those that miss the fewest targets; of equals the first. None: there is no way.

    `left_s`: of the TTFT target. None: there is no target. `gaps_within_s`: gaps have a target, so a way apart goes
    before its equals if its wait there is a small share of this time, or where those who compute prompts have little
    to do. None: gaps have none. `waited_s`: so far. Who has waited longer than it would still take apart stands in a
    queue, and such a queue does not end by waiting.

    Whoever decodes is to have headroom, though: where steps are long because so many decode, and are not where prompts
    are computed, prompts are kept apart no more.
    """
    ways = list(ways)
    some_apart = any(way.is_apart for way in ways)
    short_s = MUCH_SLOWER * min(way.itl_s for way in ways) if some_apart else 0.0

    def rank(way: Way) -> tuple[float, ...]:
        missed = num_missed(way, left_s, itl_target_s)
        if gaps_within_s is None:
            return missed, way.cost_s
        target_s = smallest([itl_target_s, way.others_target_s], None)
        has_headroom = target_s is None or way.itl_s <= max(HEADROOM * target_s, short_s)
        waits_little = way.is_apart and has_headroom and waited_s <= way.ttft_s
        is_light = waits_little and way.prompt_load < LIGHT_LOAD
        is_soon = waits_little and way.ttft_s <= way.alone_s + APART_SHARE * (gaps_within_s - way.alone_s)
        spares_prompts = has_headroom and not way.slows_prompts
        return missed, not is_light, not is_soon, not spares_prompts, way.cost_s

    return min(ways, key=rank, default=None)


def num_missed(way: Way, left_s: float | None, itl_target_s: float | None) -> int:
    misses_ttft = left_s is not None and way.ttft_s > left_s
    smallest_s = smallest([itl_target_s, way.others_target_s], None)
    return misses_ttft + (smallest_s is not None and way.itl_s > smallest_s)


def smallest(targets: Iterable[float | None], default: float | None) -> float | None:
    """The target that all of these are kept by, where `default` is that of who has none; None: there is none."""
    return min((each for target in targets if (each := default if target is None else target)), default=None)


def spare_s(last_s: Collection[float], target_s: float) -> float:
    """Seconds by which a step may exceed what a target of the mean leaves each: what the last ones were shorter by.

    Below 0: it has to be shorter by so much, for with the last ones it would miss the target itself.
    """
    taken_s, num_steps = sum(last_s), len(last_s) + 1
    left_s = MEAN_AIM * target_s * (num_steps - 1) - taken_s
    return left_s if left_s > 0 else min(0.0, target_s * (num_steps - MEAN_AIM) - taken_s)


def _limit_s(bare_s: float, target_s: float, overrun: float, spare_s: float) -> float:
    """Predicted seconds of a step with a chunk, that takes so long without."""
    if bare_s > target_s:
        return LEAST_STRETCH * bare_s
    aim_s = AIM * target_s / overrun + spare_s
    return aim_s if bare_s < aim_s or spare_s < 0 else target_s


def chunk_beside(
    steps: StepEstimator,
    rows: StepShape,
    start: int,
    target_s: float | None,
    max_len: int,
    num_prompts: float,
    *,
    adapts: bool = False,
    spare_s: float = 0.0,
    pace: float = inf,
) -> int:
    """Prompt tokens, of a prompt from `start` on, in a step with running sequences: within their smallest target so
    many that a token of a prompt costs all concerned the least. Without a target `max_len`, unless it `adapts`.

    num_prompts: that wait for the replica's steps. spare_s: by which the step may exceed the target, if that is of the
    mean. pace: prompt tokens for each token of the answers, where pools are full: a prompt comes when an answer ends,
    so chunks that hold as many tokens as the sequences, running or still prompts, make room for are in every step, and
    longer ones are not, with steps between them that compute little.
    """
    if not rows.num_rows or (target_s is None and not adapts):
        return max_len
    bare_s = steps.seconds(rows)
    if adapts and pace < inf:
        max_len = min(max_len, max(MIN_CHUNK_LEN, ceil(PACE_MARGIN * pace * (rows.num_rows + num_prompts))))
    if target_s is not None:
        if adapts and spare_s > 0:
            max_len = min(max_len, LONG_LEN)
        fitting_len = steps.max_chunk_len(_limit_s(bare_s, target_s, steps.overrun, spare_s), rows, start, max_len)
        return max(min(MIN_CHUNK_LEN, max_len), fitting_len)

    seconds = steps.beside(rows, start)
    if num_prompts <= MANY_PROMPTS:
        max_len = min(max_len, LONG_LEN)

    def cost_of_token(length: int) -> float:
        """Seconds: the whole step for who waits for prompts, and what the chunk adds to it for who runs."""
        step_s = seconds(length)
        return (FIRST_WEIGHT * max(1.0, num_prompts) * step_s + rows.num_rows * (step_s - bare_s)) / length

    free_len = steps.max_chunk_len(FREE_STRETCH * bare_s, rows, start, max_len)
    least_len = max(min(MIN_CHUNK_LEN, max_len), free_len)
    halves = (max_len >> number for number in range(NUM_HALVES))
    return min([least_len, *(length for length in halves if length > least_len)], key=cost_of_token)
