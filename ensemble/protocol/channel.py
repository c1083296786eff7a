"""One end of an ordered, resumable channel over calls that may be lost, repeated, or overtake each other.

    sender  ... acknowledged | first ... carried, unacknowledged ... | ... waiting: more ... |
    segment (run, first, items, more, acknowledged)      cumulative: all that is carried, up to MAX_SEGMENT_BYTES

As in TCP, every segment repeats what the other end has not acknowledged, and tells how far this end has come; a
receiver drops what it knows. So a segment that overtakes another, comes twice, or never comes is harmless.
"""

from collections import deque

import msgspec

MAX_SEGMENT_BYTES = 1 << 20  # of the items in one segment, unless the first is larger by itself


class Segment(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one end tells the other."""

    run: str  # of the end that opened the channel; another one is another channel
    first: int  # number of the first item
    items: list[bytes]
    more: bool  # there is more to carry, as soon as these items are acknowledged
    acknowledged: int  # number of the first item of the other end that has not come


class Channel:
    """Not thread-safe. Items are encoded messages, numbered from 0 on each side."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._carried: deque[bytes] = deque()  # by some segment, and not acknowledged
        self._carried_bytes = 0
        self._waiting: deque[bytes] = deque()  # behind them
        self._first = 0  # number of the first of all these
        self._next = 0  # number of the first item that has not come
        self._owes_acknowledgement = False  # the other end has more to carry

    @property
    def has_news(self) -> bool:
        """Whether a segment now would carry an item that none has carried, or one that the other end waits for."""
        return self._owes_acknowledgement or self._fits_one_more

    @property
    def num_unacknowledged(self) -> int:
        return len(self._carried) + len(self._waiting)

    @property
    def _fits_one_more(self) -> bool:
        if not self._carried or not self._waiting:
            return bool(self._waiting)
        return self._carried_bytes + len(self._waiting[0]) <= MAX_SEGMENT_BYTES

    def send(self, item: bytes) -> None:
        """Puts one encoded message behind those before it."""
        self._waiting.append(item)

    def segment(self) -> Segment:
        """What is to be told now."""
        while self._fits_one_more:
            item = self._waiting.popleft()
            self._carried.append(item)
            self._carried_bytes += len(item)
        self._owes_acknowledgement = False
        return self._segment(list(self._carried), more=bool(self._waiting))

    def acknowledgement(self) -> Segment:
        """A segment of no items: what is to be told where another is to carry them."""
        return self._segment([], more=False)

    def _segment(self, items: list[bytes], more: bool) -> Segment:
        return Segment(run=self.run, first=self._first, items=items, more=more, acknowledged=self._next)

    def receive(self, segment: Segment) -> list[bytes]:
        """Takes what the other end tells. Returns its items that are new here, in order; each comes out once.

        Raises ValueError, and changes nothing, for a segment that this channel's other end cannot have sent.
        """
        end = self._first + len(self._carried)
        if segment.run != self.run or not 0 <= segment.acknowledged <= end or not 0 <= segment.first <= self._next:
            raise ValueError(
                f"segment of run {segment.run!r}, items {segment.first} on, acknowledging {segment.acknowledged}:"
                f" this is run {self.run!r}, {self._next} items have come and {end} have gone out"
            )
        while self._first < segment.acknowledged:
            self._carried_bytes -= len(self._carried.popleft())
            self._first += 1
        new = segment.items[self._next - segment.first :]
        self._next += len(new)
        self._owes_acknowledgement |= segment.more
        return new


encode_segment = msgspec.msgpack.Encoder().encode
decode_segment = msgspec.msgpack.Decoder(Segment).decode
