"""How long a step, and a hand-off, will take: by what they took before.

    step      base + per_token * max(0, tokens - knee) + per_prompt_key * prompt_keys
              + per_row * rows + per_row_key * row_keys
              (reading the weights takes as long as the products of `knee` tokens, which it hides)
              of a pipeline: what one of its places takes
    hand-off  base + per_byte * bytes

No coefficient is negative, so what is predicted never falls when there is more to do. `fitting.py` finds them.
"""

from collections import deque
from collections.abc import Callable, Iterable
from math import inf, sqrt

import msgspec
import numpy as np

from ensemble.scheduling.fitting import Samples, fit_non_negative

KNEES = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # tokens
_LEAST_S = 1e-6
_KNEE_GAIN = 0.9  # of the squared error: a knee has to be worth its parameter
_NUM_MIXED = 128  # steps of the newest, whose times say by how much a mixed step overruns its prediction
_OVERRUN_SHARE = 0.95  # of them take no longer than that
_MAX_OVERRUN = 1.3  # what takes longer was held up by something else


class StepShape(msgspec.Struct, frozen=True, array_like=True):
    """What a step computes, as far as its time depends on it."""

    num_prompt_tokens: int = 0
    num_prompt_keys: int = 0  # that those tokens attend to, each token's counted
    num_rows: int = 0  # sequences that decode
    num_row_keys: int = 0  # tokens of their KV

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_rows

    def with_chunk(self, start: int, length: int) -> "StepShape":
        """The same step with positions [start, start + length) of another prompt."""
        num_keys = self.num_prompt_keys + prompt_keys(start, length)
        return StepShape(self.num_prompt_tokens + length, num_keys, self.num_rows, self.num_row_keys)

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]], context_lens: Iterable[int]) -> "StepShape":
        """`chunks`: (start, length) of prompts' parts; `context_lens`: tokens of each sequence that decodes."""
        chunks, lens = list(chunks), list(context_lens)
        num_keys = sum(prompt_keys(start, length) for start, length in chunks)
        return cls(sum(length for _, length in chunks), num_keys, len(lens), sum(lens))


class TimedStep(msgspec.Struct, frozen=True, array_like=True):
    """A step that has run."""

    shape: StepShape
    seconds: float


NO_STEP = StepShape()


def prompt_keys(start: int, length: int) -> int:
    """Keys that the tokens at [start, start + length) attend to: position p to p + 1 of them."""
    return length * start + length * (length + 1) // 2


class StepEstimator:
    """Seconds of a replica's steps. Before any sample it predicts 0."""

    def __init__(self) -> None:
        self._samples = Samples()
        self._knee = 0
        self._coefficients = [0.0] * 5
        self._mixed: deque[float] = deque(maxlen=_NUM_MIXED)  # seconds over those predicted
        self.overrun = 1.0  # at least: what nearly all steps with a chunk and rows take of what is predicted

    @property
    def has_samples(self) -> bool:
        return self._samples.num_samples > 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step has run. What took no time is no sample."""
        if seconds > 0 and shape.num_tokens:
            if self.has_samples and shape.num_prompt_tokens and shape.num_rows:
                self._mixed.append(seconds / self.seconds(shape))
                self.overrun = _overrun(sorted(self._mixed))
            kind = (shape.num_prompt_tokens, shape.num_prompt_keys, shape.num_rows, shape.num_row_keys)
            if self._samples.add(kind, seconds):
                self._fit()

    def learn(self, steps: Iterable[TimedStep]) -> None:
        """Steps have run before the first prediction is asked for: all of them count from now on."""
        num_samples = self._samples.num_samples
        for step in steps:
            self.observe(step.shape, step.seconds)
        if self._samples.num_samples > num_samples:
            self._fit()
        self._mixed.clear()  # predicted by too few samples
        self.overrun = 1.0

    def seconds(self, shape: StepShape) -> float:
        if not self.has_samples:
            return 0.0
        base, per_token, per_prompt_key, per_row, per_row_key = self._coefficients
        seconds = base + per_token * max(0, shape.num_tokens - self._knee) + per_prompt_key * shape.num_prompt_keys
        return max(_LEAST_S, seconds + per_row * shape.num_rows + per_row_key * shape.num_row_keys)

    def beside(self, rows: StepShape, start: int) -> Callable[[int], float]:
        """Seconds of a step with these rows by the length of the chunk, from `start` on, in it: quick to ask again."""
        base, per_token, per_prompt_key, per_row, per_row_key = self._coefficients
        fixed = base + per_prompt_key * rows.num_prompt_keys + per_row * rows.num_rows + per_row_key * rows.num_row_keys
        num_beyond = rows.num_tokens - self._knee
        if not self.has_samples:
            return lambda length: 0.0

        def seconds(length: int) -> float:
            keys_s = per_prompt_key * (length * start + length * (length + 1) // 2)
            return max(_LEAST_S, fixed + keys_s + per_token * max(0, num_beyond + length))

        return seconds

    def seconds_of_prompts(self, num_tokens: int, num_keys: int, chunk_len: int, beside: StepShape = NO_STEP) -> float:
        """Of all steps that compute so much of prompts, at most `chunk_len` tokens each, beside the same rest."""
        num_whole, num_left = divmod(num_tokens, chunk_len)
        keys_per_token = num_keys / max(1, num_tokens)  # a step's time grows evenly with its keys: their mean will do

        def step_s(length: int) -> float:
            num_prompt_keys = beside.num_prompt_keys + round(keys_per_token * length)
            return self.seconds(
                StepShape(beside.num_prompt_tokens + length, num_prompt_keys, beside.num_rows, beside.num_row_keys)
            )

        return num_whole * step_s(chunk_len) + (step_s(num_left) if num_left else 0.0)

    def max_chunk_len(self, limit_s: float, beside: StepShape, start: int, max_len: int) -> int:
        """The most tokens of a prompt, from `start` on, with which the step takes no longer than `limit_s`; 0: none."""
        seconds = self.beside(beside, start)
        if seconds(max_len) <= limit_s:
            return max_len
        if seconds(1) > limit_s:
            return 0
        # base + per_token * max(0, tokens - knee) + per_key * (length * start + length * (length + 1) / 2) = limit
        base, per_token, per_key, per_row, per_row_key = self._coefficients
        base += per_key * beside.num_prompt_keys + per_row * beside.num_rows + per_row_key * beside.num_row_keys
        num_hidden = self._knee - beside.num_tokens  # tokens that cost nothing themselves
        keys_only = _positive_root(per_key / 2, per_key * (start + 0.5), limit_s - base)
        if keys_only > num_hidden:
            keys_only = _positive_root(
                per_key / 2, per_key * (start + 0.5) + per_token, limit_s - base + per_token * num_hidden
            )
        fits = min(max_len - 1, max(1, int(keys_only)))
        while seconds(fits) > limit_s:  # by a rounding error
            fits -= 1
        while seconds(fits + 1) <= limit_s:
            fits += 1
        return fits

    def _fit(self) -> None:
        kinds, seconds, weights = self._samples.medians()
        tokens = kinds[:, 0] + kinds[:, 2]
        terms = np.ones((len(KNEES), len(kinds), 5))
        terms[:, :, 1] = np.maximum(0, tokens - np.array(KNEES)[:, None])
        terms[:, :, 2:] = kinds[:, 1:]
        coefficients, errors = fit_non_negative(terms, seconds, weights)
        best = int(np.argmin(errors * np.where(KNEES, 1, _KNEE_GAIN)))
        self._knee, self._coefficients = KNEES[best], coefficients[best].tolist()


def _overrun(ratios: list[float]) -> float:
    """Of the newest steps' seconds over those predicted, in order."""
    if len(ratios) < _NUM_MIXED // 8:
        return 1.0
    return min(_MAX_OVERRUN, max(1.0, ratios[int(_OVERRUN_SHARE * len(ratios))]))


def _positive_root(a: float, b: float, c: float) -> float:
    """x > 0 with a x^2 + b x = c, for c > 0 and a, b >= 0; infinity: there is none."""
    if a == 0:
        return c / b if b else inf
    return 2 * c / (b + sqrt(b * b + 4 * a * c))


class HandoffEstimator:
    """Seconds from the submission of a hand-off to the sequence's joining. Before any sample it predicts 0."""

    def __init__(self) -> None:
        self._samples = Samples()
        self._coefficients = [0.0, 0.0]

    @property
    def has_samples(self) -> bool:
        return self._samples.num_samples > 0

    def observe(self, num_bytes: int, seconds: float) -> None:
        if seconds > 0 and self._samples.add((num_bytes,), seconds):
            kinds, medians, weights = self._samples.medians()
            terms = np.stack([np.ones(len(kinds)), kinds[:, 0]], axis=1)
            self._coefficients = fit_non_negative(terms[None], medians, weights)[0][0].tolist()

    def seconds(self, num_bytes: int) -> float:
        base, per_byte = self._coefficients
        return base + per_byte * num_bytes
