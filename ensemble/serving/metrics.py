"""Counters, gauges and histograms of all requests and replicas, as text for Prometheus.

They are kept here and not by the Triton server's metrics API, which takes one value at a time, a round trip each: with
the gap after every token those would be thousands a second. `metrics_page.py` puts the server's own metrics first.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from ensemble.router.gauges import Gauges, Labels
from ensemble.serving.ended_request import Ended, counted, observed
from ensemble.serving.metric_families import FAMILIES


@dataclass(slots=True)
class Histogram:
    bounds: tuple[float, ...]  # a bucket for what is at most each of them
    counts: list[int] = field(init=False)  # by bucket, the last one without a bound
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Its methods may be called from any thread, and do not wait."""

    def __init__(self, model_name: str) -> None:
        self._model_label = f'model_name="{_escaped(model_name)}"'
        self._lock = threading.Lock()
        self._levels: dict[str, dict[Labels, float]] = {}  # of counters and gauges
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        for name, family in FAMILIES.items():
            if family.kind == "histogram":
                self._histograms[name] = {labels: Histogram(family.bounds) for labels in family.labels}
            else:
                self._levels[name] = dict.fromkeys(family.labels, 0)

    def count(self, ended: Ended) -> None:
        seconds = observed(ended)
        with self._lock:
            for (name, labels), value in counted(ended).items():
                self._levels[name][labels] += value
            for name, value in seconds.items():
                self._histograms[name][()].observe(value)

    def add(self, name: str, value: float) -> None:
        """Adds to a counter without labels."""
        with self._lock:
            self._levels[name][()] += value

    def observe(self, name: str, values: Iterable[float], labels: Labels = ()) -> None:
        """Adds values to a histogram."""
        with self._lock:
            histogram = self._histograms[name].setdefault(labels, Histogram(FAMILIES[name].bounds))
            for value in values:
                histogram.observe(value)

    def text(self, gauges: Gauges) -> str:
        """The page, in Prometheus's text format. gauges: what is the case now; nothing: what was when it was last."""
        with self._lock:
            if gauges:
                told = {name for name, _ in gauges}
                for name, family in FAMILIES.items():
                    if name in told or not family.labels:  # a replica that is gone has no samples any more
                        self._levels[name] = dict.fromkeys(family.labels, 0)
                for (name, labels), level in gauges.items():
                    self._levels[name][labels] = level
            return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, family in FAMILIES.items():
            yield f"# HELP {name} {family.description}"
            yield f"# TYPE {name} {family.kind}"
            for labels, level in self._levels.get(name, {}).items():
                yield f"{name}{{{self._joined(labels)}}} {level}"
            for labels, histogram in self._histograms.get(name, {}).items():
                joined, counts = self._joined(labels), list(accumulate(histogram.counts))
                for bound, count in zip([*map(str, map(float, family.bounds)), "+Inf"], counts, strict=True):
                    yield f'{name}_bucket{{{joined},le="{bound}"}} {count}'
                yield f"{name}_sum{{{joined}}} {histogram.total}"
                yield f"{name}_count{{{joined}}} {counts[-1]}"

    def _joined(self, labels: Labels) -> str:
        return ",".join([*(f'{name}="{_escaped(value)}"' for name, value in labels), self._model_label])


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
