"""Values of PromQL expressions between two scrapes, as far as dashboards here use the language.

What is read is another's parser's; what it means is Prometheus's: selectors, `rate`, `histogram_quantile`, `sum`
with `by`, and arithmetic between numbers, or between a number or a vector and a vector with the same labels.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

Labels: TypeAlias = frozenset[tuple[str, str]]
Vector: TypeAlias = dict[Labels, float]
ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a),
}
MATCHES: dict[str, Callable[[str, str], bool]] = {
    "MatchOp.Equal": str.__eq__,
    "MatchOp.NotEqual": str.__ne__,
    "MatchOp.Re": lambda value, pattern: re.fullmatch(pattern, value) is not None,
    "MatchOp.NotRe": lambda value, pattern: re.fullmatch(pattern, value) is None,
}


def samples(page: str) -> dict[str, Vector]:
    """By metric, of a scrape's text."""
    found: dict[str, Vector] = defaultdict(dict)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name][frozenset(sample.labels.items())] = sample.value
    return found


@dataclass
class Scrapes:
    before: dict[str, Vector]
    after: dict[str, Vector]
    seconds: float  # between the two

    def value(self, expression: str) -> float | Vector:
        """Raises AssertionError for what is beyond this, and for what Prometheus would refuse."""
        return self._value(promql.parse(expression))

    def _value(self, node: promql.Expr) -> float | Vector:
        match node:
            case promql.NumberLiteral():
                return node.val
            case promql.ParenExpr():
                return self._value(node.expr)
            case promql.VectorSelector():
                return self._select(node, self.after)
            case promql.AggregateExpr():
                return self._sum(node)
            case promql.BinaryExpr():
                return self._combine(node)
            case promql.Call() if node.func.name == "rate":
                return self._rate(node.args[0].vector_selector)
            case promql.Call() if node.func.name == "histogram_quantile":
                buckets = self._value(node.args[1])
                assert isinstance(buckets, dict)
                return quantiles(node.args[0].val, buckets)
        raise AssertionError(f"{node} is not evaluated here")

    def _select(self, node: promql.VectorSelector, scrape: dict[str, Vector]) -> Vector:
        assert node.name in scrape, f"there is no {node.name}"
        matchers = [(MATCHES[str(each.op)], each.name, each.value) for each in node.matchers.matchers]
        return {
            labels: value
            for labels, value in scrape[node.name].items()
            if all(matches(dict(labels).get(name, ""), wanted) for matches, name, wanted in matchers)
        }

    def _rate(self, node: promql.VectorSelector) -> Vector:
        now, then = self._select(node, self.after), self._select(node, self.before)
        return {labels: (value - then[labels]) / self.seconds for labels, value in now.items() if labels in then}

    def _sum(self, node: promql.AggregateExpr) -> Vector:
        vector, modifier = self._value(node.expr), node.modifier
        assert str(node.op) == "sum" and isinstance(vector, dict)
        assert modifier is None or str(modifier.type) == "AggModifierType.By"
        totals: Vector = defaultdict(float)
        for labels, value in vector.items():
            totals[frozenset(each for each in labels if modifier and each[0] in modifier.labels)] += value
        return totals

    def _combine(self, node: promql.BinaryExpr) -> float | Vector:
        assert node.modifier is None
        left, right, combine = self._value(node.lhs), self._value(node.rhs), ARITHMETIC[str(node.op)]
        if isinstance(left, dict) and isinstance(right, dict):
            return {labels: combine(value, right[labels]) for labels, value in left.items() if labels in right}
        if isinstance(left, dict):
            assert not isinstance(right, dict)
            return {labels: combine(value, right) for labels, value in left.items()}
        if isinstance(right, dict):
            return {labels: combine(left, value) for labels, value in right.items()}
        return combine(left, right)


def quantiles(q: float, buckets: Vector) -> Vector:
    """Of each histogram, as its cumulative buckets tell, by linear interpolation in the bucket that holds it."""
    by_rest: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        bound = dict(labels)["le"]
        by_rest[frozenset(each for each in labels if each[0] != "le")].append((float(bound), count))
    return {rest: _quantile(q, sorted(pairs)) for rest, pairs in by_rest.items()}


def _quantile(q: float, buckets: Iterable[tuple[float, float]]) -> float:
    *finite, (last, total) = buckets
    assert last == math.inf and finite
    if total == 0:
        return math.nan
    lower, below = 0.0, 0.0
    for bound, count in finite:
        if count >= q * total:
            return lower + (bound - lower) * (q * total - below) / (count - below)
        lower, below = bound, count
    return finite[-1][0]
