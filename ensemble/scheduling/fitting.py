"""Samples of what took how long, and coefficients that fit them.

Samples are kept by what kind they are of, a few of the newest each: those that are rare are not forgotten for those
that come a hundred times a second, and of each kind the median counts, so that one which something else held up moves
nothing.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_MAX_KINDS = 256
_SAMPLES_OF_A_KIND = 7
_MAX_FIT_INTERVAL = 256  # samples; from 1 on it doubles
_NEW_KIND_INTERVAL = 8
_SHORTEST_S = 1e-9  # that a sample counts for: relative errors stay finite
_FADE = 0.7  # of what a kind's samples have counted, at each fit
Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Kind:
    """Samples that are alike: each number of theirs has the same power of two."""

    newest: deque[tuple[float, tuple[int, ...]]] = field(default_factory=lambda: deque(maxlen=_SAMPLES_OF_A_KIND))
    weight: float = 1.0


class Samples:
    """The newest samples of each kind. The kind that has not been seen for longest goes first."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[tuple[int, ...], _Kind] = OrderedDict()
        self.num_samples = 0
        self._interval = 1
        self._num_since_fit = 0

    def add(self, numbers: tuple[int, ...], seconds: float) -> bool:
        """Returns whether it is time to fit again: after more and more samples, and soon after one of a new kind."""
        key = tuple(number.bit_length() for number in numbers)
        is_new = key not in self._kinds
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        kind.newest.append((seconds, numbers))
        kind.weight += 1
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        self.num_samples += 1
        self._num_since_fit += 1
        if self._num_since_fit < (min(self._interval, _NEW_KIND_INTERVAL) if is_new else self._interval):
            return False
        self._interval = min(2 * self._interval, _MAX_FIT_INTERVAL)
        self._num_since_fit = 0
        return True

    def medians(self) -> tuple[Array, Array, Array]:
        """Of each kind the sample of median seconds: its numbers [kinds, numbers], its seconds, and its weight."""
        middle = [sorted(kind.newest)[(len(kind.newest) - 1) // 2] for kind in self._kinds.values()]
        weights = [kind.weight for kind in self._kinds.values()]
        for kind in self._kinds.values():
            kind.weight = max(1.0, _FADE * kind.weight)
        return np.array([numbers for _, numbers in middle], float), np.array([s for s, _ in middle]), np.array(weights)


def fit_non_negative(terms: Array, seconds: Array, weights: Array) -> tuple[Array, Array]:
    """Coefficients >= 0 of the terms [sets, samples, terms] for the least squared relative error, of each set of terms
    on its own: [sets, terms]; and those errors [sets].

    By trying every choice of terms that may be above zero, with five terms 32 systems of five equations: all are solved
    at once, for a replica's next step and its tokens wait.
    """
    scale = np.maximum(terms.max(axis=1, keepdims=True), 1e-300)
    relative = terms / scale / np.maximum(seconds, _SHORTEST_S)[:, None]
    weighted = relative * weights[:, None]
    gram, target = weighted.transpose(0, 2, 1) @ relative, weighted.sum(axis=1)
    num_sets, num_terms = target.shape
    chosen = np.array(list(product((0.0, 1.0), repeat=num_terms)))
    identity = np.eye(num_terms)
    systems = gram[:, None] * (chosen[:, :, None] * chosen[:, None, :]) + identity * (1 - chosen)[:, None, :]
    largest = gram.diagonal(axis1=1, axis2=2).max(axis=1)
    systems += identity * (1e-9 * largest)[:, None, None, None]  # where samples do not tell terms apart
    solutions = np.linalg.solve(systems, (target[:, None] * chosen)[..., None])[..., 0]  # [sets, choices, terms]
    squares = ((solutions @ gram) * solutions).sum(axis=2)
    errors = weights.sum() + squares - 2 * (solutions @ target[:, :, None])[..., 0]
    errors[(solutions < 0).any(axis=2)] = np.inf
    each, best = np.arange(num_sets), errors.argmin(axis=1)
    return solutions[each, best] / scale[:, 0], np.maximum(0.0, errors[each, best])
