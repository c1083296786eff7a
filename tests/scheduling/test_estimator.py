"""The estimator knows what steps take, on whatever device, and never believes that more work takes less time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.scheduling.estimator import HandoffEstimator, StepEstimator, StepShape, TimedStep, prompt_keys

COUNTS = st.integers(0, 4096)
SHAPES = st.builds(StepShape, COUNTS, st.integers(0, 1 << 24), st.integers(0, 512), st.integers(0, 1 << 22)).filter(
    lambda shape: shape.num_tokens > 0
)
SAMPLES = st.lists(st.tuples(SHAPES, st.floats(1e-5, 10.0)), min_size=1, max_size=60)


class Device:
    """Steps take what their terms say, with noise; one in twenty is held up by something else."""

    def __init__(self, seed: int, *, knee: int, base: float = 0.01, per_token: float = 4e-5) -> None:
        self.rng = random.Random(seed)
        self.knee, self.base, self.per_token = knee, base, per_token

    def seconds(self, shape: StepShape) -> float:
        products = self.per_token * max(0, shape.num_tokens - self.knee)
        return self.base + products + 2e-9 * shape.num_prompt_keys + 2e-8 * shape.num_row_keys

    def shape(self) -> StepShape:
        num_rows = self.rng.choice([0, 1, 4, 16, 60, 100, 200])
        chunks = [(self.rng.randrange(3000), self.rng.choice([16, 64, 200, 256, 512, 1024, 2048]))]
        lens = [self.rng.randrange(10, 3000) for _ in range(num_rows)]
        return StepShape.of(chunks if not num_rows or self.rng.random() < 0.4 else [], lens)

    def sample(self) -> tuple[StepShape, float]:
        shape = self.shape()
        held_up = 12 if self.rng.random() < 0.05 else 1
        return shape, self.seconds(shape) * self.rng.uniform(0.95, 1.05) * held_up


def error_p50_and_p95(estimator: StepEstimator, device: Device) -> tuple[float, float]:
    shapes = [device.shape() for _ in range(400)]
    errors = sorted(abs(estimator.seconds(each) / device.seconds(each) - 1) for each in shapes)
    return errors[200], errors[380]


@pytest.mark.parametrize("knee", [0, 192])
@pytest.mark.parametrize("seed", range(3))
def test_it_recovers_what_a_device_takes_in_spite_of_noise_and_steps_that_were_held_up(knee: int, seed: int) -> None:
    device, estimator = Device(seed, knee=knee), StepEstimator()
    for _ in range(600):
        estimator.observe(*device.sample())
    p50, p95 = error_p50_and_p95(estimator, device)
    assert p50 < 0.03 and p95 < 0.08


def test_all_steps_that_were_timed_at_start_count_at_once() -> None:
    """The largest come last; a fit that waits for more samples would not know them."""
    shapes = [StepShape(0, 0, num_rows, 32 * num_rows) for num_rows in (1, 4, 16, 64)] * 8
    shapes += [StepShape(length, prompt_keys(0, length)) for length in (256, 512, 1024, 2048)]
    estimator = StepEstimator()
    estimator.learn([TimedStep(shape, 0.01 + 1e-4 * shape.num_prompt_tokens) for shape in shapes])
    assert estimator.seconds(StepShape(2048, prompt_keys(0, 2048))) == pytest.approx(0.2148, rel=0.1)
    estimator.learn([])
    assert estimator.has_samples and not StepEstimator().has_samples


def test_it_follows_a_device_that_becomes_slower_and_does_not_forget_prompts_meanwhile() -> None:
    before, after = Device(1, knee=0), Device(1, knee=0, base=0.015, per_token=6e-5)
    estimator = StepEstimator()
    for device in (before, after):
        for _ in range(3000):
            estimator.observe(*device.sample())
    assert error_p50_and_p95(estimator, after)[0] < 0.05
    prompt = StepShape.of([(0, 1024)], [])
    for step in range(20_000):  # decode alone
        rows = StepShape.of([], [1000 + step % 500] * 64)
        estimator.observe(rows, after.seconds(rows))
    assert estimator.seconds(prompt) == pytest.approx(after.seconds(prompt), rel=0.1)


@settings(max_examples=80, deadline=None)
@given(samples=SAMPLES, shape=SHAPES, more=SHAPES)
def test_whatever_it_was_told_predictions_are_positive_and_grow_with_the_work(samples, shape, more) -> None:
    estimator = StepEstimator()
    for each, seconds in samples:
        estimator.observe(each, seconds)
    larger = StepShape(*(a + b for a, b in zip(astuple(shape), astuple(more), strict=True)))
    assert 0 < estimator.seconds(shape) <= estimator.seconds(larger) < float("inf")


def astuple(shape: StepShape) -> tuple[int, ...]:
    return shape.num_prompt_tokens, shape.num_prompt_keys, shape.num_rows, shape.num_row_keys


@settings(max_examples=40, deadline=None)
@given(limit_s=st.floats(0, 0.3), start=COUNTS, num_rows=st.integers(0, 256), max_len=st.integers(1, 4096))
def test_a_chunk_is_the_longest_that_keeps_the_step_within_the_limit(limit_s, start, num_rows, max_len) -> None:
    device, estimator = Device(5, knee=192), StepEstimator()
    for _ in range(200):
        estimator.observe(*device.sample())
    beside = StepShape.of([], [500] * num_rows)
    length = estimator.max_chunk_len(limit_s, beside, start, max_len)
    assert 0 <= length <= max_len
    if length:
        assert estimator.seconds(beside.with_chunk(start, length)) <= limit_s
    if length < max_len:
        assert estimator.seconds(beside.with_chunk(start, length + 1)) > limit_s


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 3000), length=st.integers(1, 3000), chunk_len=st.integers(1, 1000))
def test_a_prompt_takes_what_its_steps_take_together(start, length, chunk_len) -> None:
    device, estimator = Device(6, knee=0), StepEstimator()
    for _ in range(100):
        estimator.observe(*device.sample())
    beside = StepShape.of([], [200] * 8)
    ends = [*range(start + chunk_len, start + length, chunk_len), start + length]
    steps = [beside.with_chunk(begin, end - begin) for begin, end in zip([start, *ends], ends, strict=False)]
    assert sum(each.num_prompt_tokens for each in steps) == length
    together = sum(estimator.seconds(each) for each in steps)
    num_keys = prompt_keys(start, length)
    assert estimator.seconds_of_prompts(length, num_keys, chunk_len, beside) == pytest.approx(together, rel=1e-3)


def test_what_nearly_all_mixed_steps_overrun_their_prediction_by() -> None:
    """One in ten takes a fifth longer: the median, and so the prediction, does not see it. One in fifty takes ten times
    as long: something else held it up."""
    estimator = StepEstimator()
    shape, plain = StepShape.of([(0, 200)], [500] * 8), StepShape.of([], [500] * 8)
    assert estimator.overrun == 1.0
    for number in range(400):
        estimator.observe(plain, 0.03 if number % 3 == 0 else 0.01)
        estimator.observe(shape, 0.024 if number % 10 == 0 else 0.2 if number % 50 == 7 else 0.02)
    assert estimator.seconds(shape) == pytest.approx(0.02, rel=0.02)
    assert estimator.overrun == pytest.approx(1.2, rel=0.02)
    estimator.learn([TimedStep(shape, 0.02)])
    assert estimator.overrun == 1.0


def test_chunks_attend_to_as_many_keys_as_the_whole() -> None:
    assert prompt_keys(0, 10) == sum(range(1, 11)) == prompt_keys(0, 4) + prompt_keys(4, 6)


def test_before_the_first_sample_nothing_is_predicted() -> None:
    assert StepEstimator().seconds(StepShape(10, 55)) == 0 and HandoffEstimator().seconds(1 << 20) == 0


def test_a_hand_off_takes_what_its_bytes_do_and_what_every_one_does() -> None:
    rng, estimator = random.Random(3), HandoffEstimator()
    for _ in range(300):
        num_bytes = rng.randrange(1 << 16, 1 << 30)
        held_up = 50 if rng.random() < 0.1 else 1
        estimator.observe(num_bytes, (0.004 + num_bytes / 100e9) * rng.uniform(0.95, 1.05) * held_up)
    assert estimator.seconds(1 << 29) == pytest.approx(0.004 + (1 << 29) / 100e9, rel=0.05)
