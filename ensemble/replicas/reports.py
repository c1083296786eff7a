"""What a replica tells of its swaps and its prefix cache: what is new since the last report."""

from ensemble.cache.prefix_cache import PrefixCache
from ensemble.cache.swapper import Swapped
from ensemble.protocol.router_replica import Event, PrefixReport, SwapReport


class SwapReports:
    def __init__(self, block_bytes: int, num_host_blocks: int) -> None:
        self._block_bytes = block_bytes
        self._reported = (0, num_host_blocks)  # swapped sequences and free host blocks
        self._swapped: list[Swapped] = []
        self.num_preemptions = 0  # since the last report

    def add(self, swapped: Swapped) -> None:
        self._swapped.append(swapped)

    def take(self, num_swapped_seqs: int, num_free_host_blocks: int) -> list[Event]:
        host = num_swapped_seqs, num_free_host_blocks
        if host == self._reported and not self.num_preemptions and not self._swapped:
            return []
        out, back = ([each for each in self._swapped if each.way == way] for way in ("out", "in"))
        report = SwapReport(
            num_swapped_seqs=num_swapped_seqs,
            num_free_host_blocks=num_free_host_blocks,
            num_preemptions=self.num_preemptions,
            bytes_out=sum(each.num_blocks for each in out) * self._block_bytes,
            bytes_in=sum(each.num_blocks for each in back) * self._block_bytes,
            out_s=[each.seconds for each in out],
            in_s=[each.seconds for each in back],
        )
        self._reported, self.num_preemptions, self._swapped = host, 0, []
        return [report]


class PrefixReports:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._reported = (0, 0)  # tokens asked of the cache, and found

    def take(self) -> list[Event]:
        stored, evicted = self._cache.take_events()
        num_queried_before, num_hit_before = self._reported
        self._reported = self._cache.num_queried_tokens, self._cache.num_hit_tokens
        num_queried = self._cache.num_queried_tokens - num_queried_before
        if not (stored or evicted or num_queried):
            return []
        return [
            PrefixReport(
                stored=stored,
                evicted=evicted,
                num_queried_tokens=num_queried,
                num_hit_tokens=self._cache.num_hit_tokens - num_hit_before,
            )
        ]
