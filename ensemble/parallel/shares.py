"""Which part of a model is a rank's: of a dimension, of its heads. Pure arithmetic, the same on every rank."""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from ensemble.errors import ConfigError

_UNIT = 64  # elements; shares are whole units where the dimension is, which keeps rows aligned for the kernels


class OneOf(Protocol):
    """A rank among those that divide a model's layers, such as one's `TensorParallel`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Rank(NamedTuple):
    """By its number alone."""

    rank: int
    size: int


def shares(size: int, num_ranks: int) -> list[range]:
    """`size` elements in `num_ranks` pieces, in order, as equal as whole units allow. None is empty."""
    unit = math.gcd(size, _UNIT)
    while size // unit < num_ranks:
        if unit == 1:
            raise ConfigError(f"tensor_parallel_size = {num_ranks}: a dimension of {size} cannot be divided by so many")
        unit //= 2
    borders = [size // unit * rank // num_ranks * unit for rank in range(num_ranks + 1)]
    return [range(start, end) for start, end in pairwise(borders)]


def share(size: int, parallel: OneOf) -> range:
    """This rank's piece."""
    return shares(size, parallel.size)[parallel.rank]


@dataclass(frozen=True, slots=True)
class HeadShare:
    """A rank's heads. Its query heads lie side by side; each `num_queries / num_kv` of them share a KV head."""

    queries: range  # of the model's query heads
    kv: tuple[int, ...]  # the model's KV head behind each of the rank's

    @property
    def num_queries(self) -> int:
        return len(self.queries)

    @property
    def num_kv(self) -> int:
        return len(self.kv)

    def query_rows(self, head_dim: int) -> list[range]:
        """The rank's rows of a projection to queries."""
        return [range(self.queries.start * head_dim, self.queries.stop * head_dim)]

    def kv_rows(self, head_dim: int) -> list[range]:
        """The rank's rows of a projection to keys or values, as few runs as they make."""
        runs: list[range] = []
        for head in self.kv:
            start = head * head_dim
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(range(start, (head + 1) * head_dim))
        return runs


def share_heads(num_heads: int, num_kv_heads: int, parallel: OneOf) -> HeadShare:
    """Any degree that divides the query heads. Raises ConfigError for another.

    Where there are fewer KV heads than ranks, several ranks hold the same one. Where ranks and groups of query heads
    do not line up, as 24 query heads of 8 KV heads over 3 ranks, a rank holds a KV head more than once: attention
    wants every KV head to serve as many query heads.
    """
    if num_heads % parallel.size:
        raise ConfigError(f"tensor_parallel_size = {parallel.size}: a divisor of the {num_heads} query heads is needed")
    num_queries, group = num_heads // parallel.size, num_heads // num_kv_heads
    queries = range(parallel.rank * num_queries, (parallel.rank + 1) * num_queries)
    return HeadShare(queries, tuple(query // group for query in queries[:: math.gcd(num_queries, group)]))


def share_layers(num_layers: int, num_places: int, head_cost: float, counts: list[int] | None = None) -> list[range]:
    """The layers of each place of a pipeline, in order; `counts` of them, or so that the slowest is as fast as can be.

    `head_cost` is the output projection's, in layers; the last place has it. Raises ConfigError where a place would
    have no layer.
    """
    if num_places > num_layers:
        raise ConfigError(f"pipeline_parallel_size = {num_places}: the model has {num_layers} layers")
    if counts is not None and sum(counts) != num_layers:
        raise ConfigError(f"pipeline_layers = {counts}: the model's {num_layers} layers are needed in all")
    if counts is None:

        def slowest(num_last: int) -> float:
            others = -(-(num_layers - num_last) // (num_places - 1))
            return max(num_last + head_cost, others)

        most = num_layers - num_places + 1
        num_last = min(range(most, 0, -1), key=slowest) if num_places > 1 else num_layers
        rest, num_others = num_layers - num_last, num_places - 1
        counts = [rest // num_others + (place < rest % num_others) for place in range(num_others)] + [num_last]
    borders = [0, *accumulate(counts)]
    return [range(start, end) for start, end in pairwise(borders)]
