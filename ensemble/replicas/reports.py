"""What a replica tells: of a step, of arrivals, and what is new of its swaps and its prefix cache."""

from ensemble.cache.prefix_cache import PrefixCache
from ensemble.cache.swapper import Swapped
from ensemble.protocol.router_replica import Event, Joined, KVHandoff, PrefixReport, StepDone, SwapReport
from ensemble.request import Sequence
from ensemble.scheduling.estimator import TimedStep
from ensemble.transfer.puller import Pull


def step_done(
    sampled: list[Sequence],
    handoffs: list[KVHandoff],  # of the prompts that it has finished and that go on elsewhere
    batch_ids: list[int],
    num_free_blocks: int,
    timed: TimedStep | None = None,  # None: nothing was run
) -> StepDone:
    return StepDone(
        request_ids=[sequence.request_id for sequence in sampled],
        positions=[len(sequence.output_token_ids) - 1 for sequence in sampled],
        token_ids=[sequence.last_token_id for sequence in sampled],
        finished={each.request_id: each.finish_reason for each in sampled if each.finish_reason is not None},
        log_probs={each.request_id: each.last_log_probs for each in sampled if each.last_log_probs is not None},
        handoffs=handoffs,
        batch_ids=batch_ids,
        num_free_blocks=num_free_blocks,
        timed=timed,
    )


def joined(pulls: list[Pull]) -> Joined:
    return Joined(
        request_ids=[pull.request_id for pull in pulls],
        transfer_s=[pull.seconds for pull in pulls],
        transfer_bytes=[pull.num_bytes for pull in pulls],
        waited_s=[pull.waited_s for pull in pulls],
        transports=[pull.source.transport for pull in pulls],
    )


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
