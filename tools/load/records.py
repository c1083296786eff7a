"""What became of each request, as its client saw it, and what follows from that: TTFT, TPOT, ITL, targets met."""

import re
from collections.abc import Iterable
from itertools import pairwise

import msgspec
import numpy as np

from ensemble.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "gap", "e2el")
PHASES = ("queue", "prefill", "bridge", "handoff", "decode")
LONG_OUTPUT = 100  # tokens, from which a request's ITL is the P99 of its gaps, not the longest
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "gap": "longest gap", "e2el": "E2EL"}


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. Times are in seconds since the run began."""

    prompt_len: int  # tokens
    output_len: int  # tokens that were asked for
    due: float  # by the schedule; where requests wait for others to end: when it was sent
    sent: float
    times: list[float] = []  # of each response that has tokens
    tokens: list[int] = []  # in each
    error: str = ""
    text: str = ""
    phases: dict[str, float] = {}  # seconds, by the server's own timeline

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def is_complete(self) -> bool:
        return not self.error and self.num_tokens >= self.output_len

    @property
    def ttft(self) -> float:
        """Counts from the schedule: what the client itself was late by is not hidden."""
        return self.times[0] - self.due

    @property
    def tpot(self) -> float | None:
        """None of one response: nothing came after the first."""
        num_later = self.num_tokens - self.tokens[0]
        return (self.times[-1] - self.times[0]) / num_later if num_later else None

    @property
    def gaps(self) -> list[float]:
        """Between responses, whatever number of tokens each holds."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def longest_gap(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def itl(self) -> float:
        """What is judged by a target: the longest gap, or of a long output the P99 of its gaps."""
        if self.output_len < LONG_OUTPUT:
            return self.longest_gap
        return float(np.percentile(self.gaps, 99)) if self.gaps else 0.0

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.due

    def value(self, metric: str) -> float:
        """Seconds; 0 for a TPOT that there is not."""
        match metric:
            case "ttft":
                return self.ttft
            case "tpot":
                return self.tpot or 0.0
            case "itl":
                return self.itl
            case "gap":
                return self.longest_gap
        return self.e2el

    def meets(self, targets_ms: dict[str, float]) -> bool:
        """Whether it is complete and within all targets, by metric in milliseconds."""
        return self.is_complete and all(1e3 * self.value(metric) <= ms for metric, ms in targets_ms.items())


class Run(msgspec.Struct, kw_only=True):
    """A whole run, as it is kept on disk."""

    load: dict[str, str | int | float | None]  # what was asked: workload, rate, seed, ...
    lag_p99_ms: float  # of the client: how late it sent, and how late it looked
    max_lag_ms: float  # beyond which the client was the bottleneck
    client_cpu_share: float  # of the cores that its processes had
    records: list[Record]

    @property
    def is_valid(self) -> bool:
        return self.lag_p99_ms <= self.max_lag_ms

    @property
    def duration(self) -> float:
        """Seconds from the first request to the last response."""
        ends = [each.times[-1] for each in self.records if each.times]
        return max(ends, default=0.0) - min((each.due for each in self.records), default=0.0)

    @property
    def completed(self) -> list[Record]:
        return [each for each in self.records if each.is_complete]

    def attainment(self, targets_ms: dict[str, float]) -> float:
        """The share of all requests, failed ones too, that meet all targets."""
        return sum(each.meets(targets_ms) for each in self.records) / len(self.records)


def parse_targets(goodput: Iterable[str]) -> dict[str, float]:
    """Metric |-> milliseconds, of METRIC:MS. Raises ConfigError."""
    targets = {}
    for each in [part for text in goodput for part in text.replace(",", " ").split()]:
        if not re.fullmatch(rf"({'|'.join(METRICS)}):\d+(\.\d+)?", each):
            raise ConfigError(f"--goodput {each}: must be {', '.join(METRICS[:-1])} or {METRICS[-1]}, a colon, and ms")
        metric, ms = each.split(":")
        targets[metric] = float(ms)
    return targets


def describe(targets_ms: dict[str, float]) -> str:
    return " and ".join(f"{NAMES[metric]} <= {ms:g} ms" for metric, ms in targets_ms.items())
