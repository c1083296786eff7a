"""Where a prompt is computed and its answer decoded: the way with the earliest end among those that keep the targets.

    hand off   a replica computes the prompt, whoever has room decodes it; its KV goes over
    stay       a replica computes the prompt beside its running sequences, and decodes it: nothing goes over

What a way costs is the time to the first token, what the running sequences beside the prompt are delayed by, the
expected output's time at the speed of the replica that decodes it, and what prompts lose meanwhile where that is a
replica for prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ensemble.scheduling.estimator import NO_STEP, StepEstimator, StepShape

MIN_CHUNK_LEN = 16  # tokens, so that prompts get on where steps are too long already
AIM = 0.9  # of an ITL target: predictions err, and the longest gap of an answer counts
LEAST_STRETCH = 1.1  # of a step by the chunk in it, where it misses its target without any
FREE_STRETCH = 1.15  # of a step by the chunk in it that is hardly felt: reading the weights hides it
STEPS_AHEAD = 4  # in which prompts that wait are to be computed; fewer at a time leave sequences the sooner their ends
STRETCH = 1.5  # of a step by the chunk in it, where nobody has a target and replicas share the prompts


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
    rows: StepShape = NO_STEP  # its running sequences
    target_s: float | None = None  # the smallest ITL target among them
    prompt_load: float = 0.0  # share of its time that prompts take, as they came lately
    full_len: int = 0  # prompt tokens of its steps without sequences, where it is there for prompts

    def with_rows(self, number: float, context_len: int) -> "Site":
        """The same with more sequences: they are on their way there."""
        num_rows = round(self.rows.num_rows + number)
        return replace(self, rows=StepShape(0, 0, num_rows, round(self.rows.num_row_keys + number * context_len)))

    def until_computed(self, work: Work) -> float:
        """Seconds until the last token of the prompt is computed, behind those that are there."""
        return self.steps.seconds_of_prompts(
            self.num_backlog_tokens + work.num_tokens, self.num_backlog_keys + work.num_keys, self.chunk_len, self.rows
        )

    def delay(self, work: Work) -> float:
        """Seconds by which the prompt holds up the running sequences."""
        if not self.rows.num_rows:
            return 0.0
        seconds = self.steps.seconds_of_prompts(work.num_tokens, work.num_keys, self.chunk_len, self.rows)
        return seconds - -(-work.num_tokens // self.chunk_len) * self.steps.seconds(self.rows)

    def itl(self, work: Work) -> float:
        """Seconds between two tokens of the answer, if it decodes here: with chunks of prompts where there are some."""
        rows = StepShape(0, 0, self.rows.num_rows + 1, self.rows.num_row_keys + work.context_len)
        bare_s, mixed_s = (
            self.steps.seconds(rows),
            self.steps.seconds(rows.with_chunk(self.mean_start, self.beside_len)),
        )
        return mixed_s if self.num_backlog_tokens else bare_s + self.prompt_load * (mixed_s - bare_s)

    def lost(self, output_s: float) -> float:
        """Seconds of computing prompts that are lost by the shorter chunks beside an answer of so many seconds."""
        if not self.full_len:
            return 0.0
        one_more = StepShape(0, 0, self.rows.num_rows + 1, self.rows.num_row_keys)
        beside_s = self.steps.seconds(one_more.with_chunk(self.mean_start, self.beside_len)) / self.beside_len
        full_s = self.steps.seconds(NO_STEP.with_chunk(self.mean_start, self.full_len)) / self.full_len
        if not beside_s:
            return 0.0
        later_s = output_s / (self.rows.num_rows + 1)  # by which the last sequence ends later, where all are alike
        return self.prompt_load * max(0.0, 1 - full_s / beside_s) * later_s


class Reader(NamedTuple):
    """A replica that may decode what another one has computed."""

    site: Site
    handoff_s: float
    wait_s: float = 0.0  # until it has room


class Way(NamedTuple):
    """A way that a request can take."""

    replica: int  # that computes the prompt
    stays: bool
    ttft_s: float  # from now
    itl_s: float
    cost_s: float
    others_target_s: float | None = None  # the smallest ITL target of those that it would decode with


def stay(site: Site, work: Work) -> Way:
    computed_s, itl_s = site.until_computed(work), site.itl(work)
    output_s = work.num_output_tokens * itl_s
    cost_s = computed_s + site.delay(work) + output_s + site.lost(output_s)
    return Way(site.replica, True, computed_s, itl_s, cost_s, site.target_s)


def hand_off(site: Site, work: Work, readers: Iterable[Reader]) -> Way | None:
    """None: there is no reader."""
    computed_s = site.until_computed(work)

    def via(reader: Reader) -> Way:
        itl_s = reader.site.itl(work)
        ttft_s = max(computed_s, reader.wait_s) + reader.handoff_s
        cost_s = ttft_s + site.delay(work) + work.num_output_tokens * itl_s
        return Way(site.replica, False, ttft_s, itl_s, cost_s, reader.site.target_s)

    return min((via(reader) for reader in readers), key=lambda way: way.cost_s, default=None)


def best(ways: Iterable[Way], left_s: float | None, itl_target_s: float | None) -> Way | None:
    """The cheapest of those that miss the fewest targets; of equals the first. None: there is no way.

    `left_s`: of the TTFT target. None: there is no target.
    """
    return min(ways, key=lambda way: (num_missed(way, left_s, itl_target_s), way.cost_s), default=None)


def num_missed(way: Way, left_s: float | None, itl_target_s: float | None) -> int:
    misses_ttft = left_s is not None and way.ttft_s > left_s
    smallest_s = smallest([itl_target_s, way.others_target_s], None)
    return misses_ttft + (smallest_s is not None and way.itl_s > smallest_s)


def smallest(targets: Iterable[float | None], default: float | None) -> float | None:
    """The target that all of these are kept by, where `default` is that of who has none; None: there is none."""
    return min((each for target in targets if (each := default if target is None else target)), default=None)


def chunk_beside(
    steps: StepEstimator,
    rows: StepShape,
    start: int,
    target_s: float | None,
    stretch: float | None,
    max_len: int,
    num_waiting_tokens: int | None = None,
) -> int:
    """Prompt tokens, of a prompt from `start` on, in a step with running sequences, so that it takes no longer than
    their smallest target; without one `stretch` times as long as without the chunk; without that, `max_len`.

    `num_waiting_tokens`: where so many wait in all, fewer may do.
    """
    if not rows.num_rows or (target_s is None and stretch is None):
        return max_len
    bare_s = steps.seconds(rows)
    if target_s is None:
        limit_s = (stretch or 1.0) * bare_s
    elif bare_s > target_s:
        limit_s = LEAST_STRETCH * bare_s
    else:
        limit_s = AIM * target_s if bare_s < AIM * target_s else target_s
    length = max(min(MIN_CHUNK_LEN, max_len), steps.max_chunk_len(limit_s, rows, start, max_len))
    if num_waiting_tokens is None:
        return length
    free_len = steps.max_chunk_len(FREE_STRETCH * bare_s, rows, start, length)
    return max(min(MIN_CHUNK_LEN, length), free_len, min(length, -(-num_waiting_tokens // STEPS_AHEAD)))
