"""The way that a request takes: the earliest end, at no more cost to those who run than their targets allow."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ensemble.scheduling.estimator import NO_STEP, StepEstimator, StepShape, prompt_keys
from ensemble.scheduling.placement import (
    LONG_LEN,
    MANY_PROMPTS,
    MIN_CHUNK_LEN,
    NUM_MEAN_STEPS,
    Reader,
    Site,
    Way,
    Work,
    best,
    chunk_beside,
    hand_off,
    num_missed,
    smallest,
    spare_s,
    stay,
)


def estimator() -> StepEstimator:
    """10 ms, 40 us a token, 20 us a row."""
    steps = StepEstimator()
    for start, length in [(0, 0), (0, 16), (0, 64), (0, 256), (0, 1024), (3000, 64), (3000, 1024)]:
        for lens in ([], [100], [100] * 16, [100] * 100, [1000] * 100):
            steps.observe(StepShape.of([(start, length)], lens), 1e-2 + 4e-5 * length + 2e-5 * len(lens))
    return steps


STEPS = estimator()
ROWS = StepShape(0, 0, 50, 5000)
PROMPT = Work(2000, prompt_keys(0, 2000), 2000, 20)


def site(replica: int, backlog: int = 0, rows: StepShape = NO_STEP, chunk_len: int = 2048) -> Site:
    return Site(replica, STEPS, chunk_len, chunk_len, 0, backlog, prompt_keys(0, backlog), rows)


def choose(prefill_backlog: int, decode_chunk_len: int, handoff_s: float = 0.02) -> Way:
    decode = site(1, rows=ROWS, chunk_len=decode_chunk_len)
    handed_off = hand_off(site(0, prefill_backlog), PROMPT, [Reader.of(decode, PROMPT, handoff_s)])
    assert handed_off is not None
    way = best([handed_off, stay(decode, PROMPT)], None, None)
    assert way is not None
    return way


def test_a_prompt_rides_on_decode_when_prefill_is_behind_and_not_before() -> None:
    assert [choose(backlog, 256).stays for backlog in (0, 2000, 20_000)] == [False, False, True]


def test_the_smaller_the_chunk_the_longer_a_prompt_waits_for_prefill() -> None:
    def first_that_rides(chunk_len: int) -> int:
        return next(backlog for backlog in range(0, 100_000, 500) if choose(backlog, chunk_len).stays)

    assert first_that_rides(512) < first_that_rides(128) < first_that_rides(32)


def test_a_slow_hand_off_makes_the_decode_replica_compute_the_prompt() -> None:
    assert not choose(0, 512).stays and choose(0, 512, handoff_s=2.0).stays


def test_of_replicas_alike_the_one_with_the_least_to_do_computes_and_the_emptier_decodes() -> None:
    work = Work(100, prompt_keys(0, 100), 100, 200)
    ways = [stay(site(index, backlog, rows), work) for index, (backlog, rows) in enumerate([(0, ROWS), (0, NO_STEP)])]
    assert best(ways, None, None) == ways[1]


def test_the_way_that_keeps_the_targets_goes_before_the_cheaper_one() -> None:
    cheap, kept = Way(0, True, 0.5, 0.01, 1.0), Way(1, False, 0.2, 0.01, 2.0)
    assert best([cheap, kept], None, None) == cheap
    assert best([cheap, kept], 0.3, None) == kept
    assert best([cheap, kept], 0.1, None) == cheap  # both miss it
    assert (num_missed(cheap, 0.3, 0.005), num_missed(kept, 0.3, None)) == (2, 0)
    assert best([], None, None) is None


def test_where_gaps_have_a_target_prompts_keep_apart_as_long_as_that_is_soon_enough() -> None:
    """One that rides is cheaper, one that stays where prompts are computed as well; each costs those beside it gaps."""

    def chosen(ttft_s: float, load: float, gaps_within_s: float | None, itl_s: float = 0.01) -> Way:
        way = best([apart(ttft_s, load, itl_s), rides, stays], 0.8, 0.02, gaps_within_s)
        assert way is not None
        return way

    def apart(ttft_s: float, load: float, itl_s: float = 0.01) -> Way:
        return Way(0, False, ttft_s, itl_s, 2.0, is_apart=True, prompt_load=load, alone_s=0.1)

    rides, stays = Way(1, True, 0.2, 0.01, 1.0), Way(0, True, 0.2, 0.01, 0.5, slows_prompts=True)
    assert chosen(0.3, 1.0, None) == stays  # the cheapest, where gaps have no target
    assert chosen(0.3, 1.0, 0.9) == apart(0.3, 1.0)
    assert chosen(0.31, 1.0, 0.9) == rides  # a longer wait than a quarter of what there is beside its own time
    assert chosen(0.3, 1.0, 0.9, itl_s=0.03) == rides  # the other side is full
    assert chosen(0.7, 0.5, 0.9) == apart(0.7, 0.5)  # a long one, but few prompts come
    assert best([apart(0.7, 0.5), rides], 0.8, 0.02, 0.9, waited_s=1.0) == rides  # many do now, whatever the mean says
    assert best([apart(0.3, 1.0), rides], 0.8, 0.02, 0.9, waited_s=0.5) == rides  # soon, but behind a queue
    assert best([rides, stays], 0.8, 0.02, 0.9) == rides
    assert chosen(0.9, 0.5, 0.9) == rides  # late: a short prompt behind a long one


def test_prompts_are_kept_apart_no_more_where_many_decode_and_few_where_prompts_are_computed() -> None:
    """Gaps of at most 20 ms: the prompt goes apart, or rides where most decode, or stays where prompts are computed."""

    def chosen(decode_s: float, prefill_s: float, *, is_apart: bool = True) -> tuple[int, bool]:
        apart = Way(0, False, 0.1, decode_s, 2.0, is_apart=is_apart, prompt_load=0.3)
        rides, stays = Way(1, True, 0.2, decode_s, 1.0), Way(0, True, 0.2, prefill_s, 0.5, slows_prompts=True)
        way = best([apart, rides, stays], 0.8, 0.02, 0.9)
        assert way is not None
        return way.replica, way.stays

    assert chosen(0.010, 0.008) == (0, False)
    assert chosen(0.016, 0.010) == (0, True)
    assert chosen(0.016, 0.015) == (0, False)  # it is no faster there
    assert chosen(0.010, 0.008, is_apart=False) == (1, True)  # some decode there; most still have headroom
    assert chosen(0.016, 0.015, is_apart=False) == (0, True)  # and here they have not: the cheapest


def test_tokens_come_later_by_the_share_of_the_time_that_prompts_take_however_long_their_chunks() -> None:
    """50 rows take 11 ms. 5,000 tokens of 40 us a second take a fifth of the time."""

    def token_s(tokens_per_s: float, beside_len: int = 2048, backlog: int = 0) -> float:
        return replace(site(0, backlog, ROWS), beside_len=beside_len, prompt_tokens_per_s=tokens_per_s).token_s()

    bare_s = STEPS.seconds(ROWS)
    assert token_s(0) == token_s(0, backlog=5000) == pytest.approx(bare_s)
    assert [token_s(5000, length) for length in (2048, 512)] == pytest.approx([bare_s / 0.8] * 2, rel=0.05)
    assert token_s(1e6, 512) == pytest.approx(STEPS.seconds(ROWS.with_chunk(0, 512)))  # one in each step, not more


def test_of_a_hand_off_it_is_known_whether_it_is_apart() -> None:
    def at(full_len: int, rows: StepShape = NO_STEP) -> Site:
        return Site(0, STEPS, 2048, 2048, rows=rows, prompt_load=0.5, full_len=full_len)

    readers = [Reader.of(site(1, rows=ROWS), PROMPT, 0.02)]
    handed_off = [hand_off(at(2048), PROMPT, readers), hand_off(at(2048, ROWS), PROMPT, readers)]
    assert [way is not None and (way.is_apart, way.prompt_load) for way in handed_off] == [(True, 0.5), (False, 0.5)]
    assert [stay(at(full_len), PROMPT).slows_prompts for full_len in (2048, 0)] == [True, False]
    alone, behind = (hand_off(replace(at(2048), num_backlog_tokens=each), PROMPT, readers) for each in (0, 5000))
    assert alone is not None and behind is not None
    assert alone.ttft_s == alone.alone_s == behind.alone_s < behind.ttft_s


def test_the_smallest_target_counts_and_the_deployment_s_for_who_has_none() -> None:
    assert smallest([None, 0.3, None], 0.2) == 0.2
    assert smallest([0.1, None], 0.2) == 0.1
    assert smallest([0.3, 0.4], 0.2) == 0.3  # nobody is without one
    assert smallest([None, 0.3], None) == 0.3
    assert smallest([None], None) is None and smallest([], 0.2) is None


@given(target_s=st.floats(0.001, 0.2), num_rows=st.integers(1, 256), num_prompts=st.floats(0, 1000))
def test_a_chunk_beside_sequences_keeps_their_target_or_is_the_least_that_gets_prompts_on(
    target_s, num_rows, num_prompts
) -> None:
    rows = StepShape(0, 0, num_rows, 100 * num_rows)
    length = chunk_beside(STEPS, rows, 0, target_s, 2048, num_prompts)
    assert MIN_CHUNK_LEN <= length <= 2048
    if length > MIN_CHUNK_LEN:
        assert STEPS.seconds(rows.with_chunk(0, length)) <= max(target_s, 1.1 * STEPS.seconds(rows))


@example(num_rows=1, target_s=0.03125, prompts=[0] * 45 + [700] + [3000] * 14)
@given(
    num_rows=st.integers(1, 64),
    target_s=st.floats(0.015, 0.1),
    prompts=st.lists(st.sampled_from([0, 0, 0, 100, 700, 3000]), min_size=60, max_size=60),
)
def test_steps_keep_a_target_of_their_mean_though_each_takes_what_the_last_ones_left(
    num_rows, target_s, prompts
) -> None:
    """Prompts of so many tokens come, one a step: chunks may be longer than a target of each gap allows."""
    rows, waiting = StepShape(0, 0, num_rows, 100 * num_rows), 0
    bare_s, taken_s = STEPS.seconds(rows), list[float]()
    longest, longest_by_gaps = 0, chunk_beside(STEPS, rows, 0, target_s, 2048, 1)
    for length in prompts:
        waiting += length
        last_s = taken_s[-(NUM_MEAN_STEPS - 1) :]
        chunk = min(waiting, chunk_beside(STEPS, rows, 0, target_s, 2048, 1, spare_s=spare_s(last_s, target_s)))
        assert chunk >= min(waiting, MIN_CHUNK_LEN)
        waiting, longest = waiting - chunk, max(longest, chunk)
        taken_s.append(STEPS.seconds(rows.with_chunk(0, chunk)) if chunk else bare_s)
        window = taken_s[-NUM_MEAN_STEPS:]
        assert sum(window) / len(window) <= 1.05 * target_s  # the least that gets prompts on may miss it
    if any(prompts[2:]) and bare_s < 0.5 * target_s:
        assert longest > longest_by_gaps or max(prompts[1:]) <= longest_by_gaps  # the first step has spared nothing yet


def test_a_target_of_the_mean_makes_chunks_no_longer_than_what_hides_the_weights_twice() -> None:
    def length(target_s: float | None, spare_s: float, *, adapts: bool = True) -> int:
        return chunk_beside(STEPS, ROWS, 0, target_s, 2048, 1, adapts=adapts, spare_s=spare_s)

    assert length(0.05, inf) == LONG_LEN < length(0.05, 0.0)  # of gaps it allows more, and so does who says so
    assert length(0.05, inf, adapts=False) == 2048


def test_where_pools_are_full_chunks_are_as_long_as_the_answers_make_room_for() -> None:
    """50 sequences run and 10 are still prompts: with 4 tokens of prompts for each of answers 240 a step keep up."""

    def length(pace: float, *, adapts: bool = True) -> int:
        return chunk_beside(STEPS, ROWS, 0, None, 2048, 10, adapts=adapts, pace=pace)

    assert length(inf) == length(100.0) == LONG_LEN
    assert 240 <= length(4.0) <= 1.5 * 240
    assert length(0.0) == MIN_CHUNK_LEN
    assert length(4.0, adapts=False) == 2048


def test_a_chunk_is_shorter_where_steps_take_longer_than_predicted() -> None:
    def length_at(overrun: float) -> int:
        steps = StepEstimator()
        for _ in range(64):
            for length in (32, 128, 512):
                shape = StepShape.of([(0, length)], [100] * 4)
                steps.observe(shape, 1e-2 + 4e-5 * length)
        for number in range(128):
            shape = StepShape.of([(0, 128)], [100] * 4)
            steps.observe(shape, (overrun if number % 10 == 0 else 1.0) * (1e-2 + 4e-5 * 128))
        rows = StepShape(0, 0, 4, 400)
        length = chunk_beside(steps, rows, 0, 0.02, 2048, 1)
        assert overrun * steps.seconds(rows.with_chunk(0, length)) <= 0.02
        return length

    assert length_at(1.1) < length_at(1.0)


def test_chunks_are_as_long_as_those_who_wait_want_against_those_who_run() -> None:
    """Of steps whose weights hide 128 tokens: a chunk that delays nobody, a full one, or one between."""
    steps = StepEstimator()
    for length in (0, 16, 64, 96, 128, 192, 256, 512, 1024, 2048):
        for num_rows in (0, 1, 8, 32):
            shape = StepShape.of([(0, length)], [100] * num_rows)
            steps.observe(shape, 1e-2 + 4e-5 * max(0, length + num_rows - 128) + 1e-9 * shape.num_prompt_keys)

    def length_of(num_rows: int, num_prompts: float) -> int:
        rows = StepShape(0, 0, num_rows, 100 * num_rows)
        return chunk_beside(steps, rows, 0, None, 2048, num_prompts, adapts=True)

    by_prompts = [length_of(16, num_prompts) for num_prompts in (1, 4, MANY_PROMPTS, 64, 256)]
    by_rows = [length_of(num_rows, 4) for num_rows in (32, 8, 1)]
    assert by_prompts == sorted(by_prompts) and by_rows == sorted(by_rows)
    assert by_prompts[0] <= 160 and by_rows[0] <= 160
    assert by_prompts[2] == by_rows[-1] == LONG_LEN  # longer ones are worth it where many wait
    assert by_prompts[-1] >= 1024
    assert length_of(0, 1) == chunk_beside(steps, ROWS, 0, None, 2048, 1) == 2048


def test_a_prompt_that_rides_delays_those_that_run_by_its_part_of_their_steps() -> None:
    riding = site(0, rows=ROWS, chunk_len=200)
    assert riding.delay(PROMPT) == pytest.approx(2000 * 4e-5, rel=0.05)
    assert site(0).delay(PROMPT) == 0
