"""Cached prefixes that go from the replica that has them to one that is to compute the rest of a prompt.

    begin: the prompt is bound to the reader, and held --LeasePrefix--> source --PrefixLeased--> PullPrefix --> reader
    settled: PrefixPulled, or either replica's end --> the prompt goes on, from what is cached at the reader then

A lease has an id of its own and holds credit at the source, until the source has said Released. Who reads acknowledges;
that may be lost, so the router ends it too when it hears of the copy's end, or of the reader's.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ensemble.protocol.router_replica import (
    CancelRequests,
    Command,
    LeasePrefix,
    PrefixLeased,
    PrefixPulled,
    PullPrefix,
)
from ensemble.router.fleet import Replica
from ensemble.router.lives import Life
from ensemble.scheduling.decoders import Decoders
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefix_index import PrefixIndex

# What has come of a prompt's fetch: its tokens are at the reader; the source had them no more; or it failed.
FetchResult = Literal["fetched", "evicted", "failed"]


class Offer(NamedTuple):
    """A prefix that a replica may fetch, with more tokens than it has."""

    source: Replica
    num_tokens: int
    seconds: float  # that it is predicted to take


@dataclass(slots=True, eq=False)
class _Move:
    attempt_id: int
    source: Replica
    reader: Replica
    hashes: list[bytes]
    began_s: float
    leased_s: float | None = None  # when it was; the reader has been told


@dataclass(eq=False)
class PrefixMoves:
    _prefill: PrefillScheduler
    _decoders: Decoders
    _prefixes: PrefixIndex
    _command: Callable[[Replica, Command], None]
    _new_id: Callable[[], int]
    _moves: dict[int, _Move] = field(default_factory=dict)  # lease id |->
    _lease_of: dict[int, int] = field(default_factory=dict)  # attempt that is held |-> lease id
    results: Counter[FetchResult] = field(default_factory=Counter)

    # ---- before

    def may_offer(self, life: Life) -> bool:
        """Whether any replica has the beginning of the prompt."""
        return bool(life.hashes) and not life.is_alone and self._prefixes.is_anywhere(life.hashes[0])

    def offer(self, reader: Replica, up_ones: Sequence[Replica], cached: Mapping[int, int]) -> Offer | None:
        """The longest prefix of a prompt that another replica has, at least a block more than the reader.

        `cached`: replica |-> tokens of the prompt. To be asked only where one `may_offer`.
        """
        block_size = self._prefixes.block_size
        num_cached_tokens, best = cached[reader.id], None
        for source in up_ones:
            num_tokens = cached[source.id] - cached[source.id] % block_size
            if num_tokens < num_cached_tokens + block_size or source.id == reader.id:
                continue
            if best is not None and num_tokens <= best.num_tokens:
                continue
            if (source.id, reader.id) in self._decoders.unreachable or source.state == "leaving":
                continue
            if source.credits.fits(num_tokens // block_size):
                best = Offer(source, num_tokens, self._seconds(source, reader, num_tokens - num_cached_tokens, up_ones))
        return best

    def _seconds(self, source: Replica, reader: Replica, num_tokens: int, up_ones: Sequence[Replica]) -> float:
        """Before it has fetched any: as long as a hand-off, to whoever has taken some."""
        num_bytes = round(num_tokens * max(each.kv_token_bytes for each in up_ones))
        if reader.prefix_pulls.has_samples:
            return reader.prefix_pulls.seconds(num_bytes)
        return max(each.handoffs.seconds(num_bytes) for each in (source, reader))

    # ---- begin to end

    def begin(self, life: Life, reader: Replica, offer: Offer, now: float) -> None:
        """The prompt is being started at the reader, which is not told before this is settled."""
        num_blocks = offer.num_tokens // self._prefixes.block_size
        move = _Move(life.attempt_id, offer.source, reader, life.hashes[:num_blocks], now)
        lease_id = self._new_id()
        self._moves[lease_id], self._lease_of[life.attempt_id] = move, lease_id
        offer.source.credits.hold(lease_id, num_blocks)
        self._prefill.hold(life.attempt_id, offer.num_tokens)
        self._command(offer.source, LeasePrefix(lease_id=lease_id, hashes=move.hashes))

    def leased(self, event: PrefixLeased, now: float) -> None:
        lease_id, num_blocks = event.handoff.request_id, len(event.handoff.block_ids)
        move = self._moves.get(lease_id)
        if move is None:
            return  # the source was taken to be dead
        if num_blocks and move.attempt_id in self._lease_of and move.reader.is_up:
            move.leased_s = now
            self._command(move.reader, PullPrefix(handoff=event.handoff, hashes=move.hashes[:num_blocks]))
            return
        if num_blocks:
            self._end_lease(lease_id, move)
        else:
            move.source.credits.release(lease_id)
        self._settle(lease_id, 0, "failed" if num_blocks else "evicted")

    def pulled(self, event: PrefixPulled, now: float) -> None:
        move = self._moves.get(event.lease_id)
        if move is None or move.leased_s is None:
            return
        if event.num_bytes:
            # What the reader waited for to be idle, or to map the source's pool, is not the copy's.
            move.reader.prefix_pulls.observe(event.num_bytes, move.leased_s - move.began_s + event.seconds)
            # Blocks that were there already did not come.
            move.reader.kv_token_bytes = max(move.reader.kv_token_bytes, event.num_bytes / event.num_tokens)
        self._end_lease(event.lease_id, move)
        self._settle(event.lease_id, event.num_tokens, "fetched" if event.reason is None else "failed")

    def attach_failed(self, source: Replica, reader: Replica) -> None:
        """The reader cannot map the source's pool."""
        for lease_id, move in list(self._moves.items()):
            if move.source is source and move.reader is reader and move.leased_s is not None:
                self._end_lease(lease_id, move)
                self._settle(lease_id, 0, "failed")

    def attempt_ended(self, attempt_id: int) -> None:
        """It is computed no more. A replica that has been sent nothing of it, as of what is or was held, frees nothing
        and says nothing."""
        self._lease_of.pop(attempt_id, None)
        reader_id = self._prefill.unsent_at(attempt_id)
        if reader_id is not None:
            self._prefill.released(reader_id, [attempt_id])
            self._decoders.released(reader_id, [attempt_id])

    def replica_down(self, replica: Replica) -> None:
        for lease_id, move in list(self._moves.items()):
            if move.source is replica:  # and its credit with it; the reader is told to detach it
                self._settle(lease_id, 0, "failed")
            elif move.reader is replica:
                if self._lease_of.pop(move.attempt_id, None) is not None:
                    self.results["failed"] += 1
                if move.leased_s is not None:  # else its lease is to be granted yet
                    self._end_lease(lease_id, move)
                    del self._moves[lease_id]

    def _end_lease(self, lease_id: int, move: _Move) -> None:
        if lease_id in move.source.credits:
            self._command(move.source, CancelRequests(request_ids=[lease_id]))

    def _settle(self, lease_id: int, num_tokens: int, result: FetchResult) -> None:
        """The prompt goes on, if it lives."""
        move = self._moves.pop(lease_id)
        if self._lease_of.pop(move.attempt_id, None) is not None:
            self.results[result] += 1
            self._prefill.resume(move.attempt_id, num_tokens)

    def check_integrity(self) -> None:
        """Every prompt that is held waits for a move."""
        held = {attempt_id: self._moves[lease_id].attempt_id for attempt_id, lease_id in self._lease_of.items()}
        assert all(attempt_id == of_move for attempt_id, of_move in held.items())
        assert self._prefill.held_ids == held.keys()
