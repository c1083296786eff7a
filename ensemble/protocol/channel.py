"""One end of an ordered, resumable channel over calls that may be lost, repeated, or overtake each other.

    sender  ... acknowledged | first .......... sent or not, unacknowledged ......... |
    segment (run, first, items, acknowledged)        cumulative: all that is unacknowledged, up to MAX_SEGMENT_BYTES

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
    items: list[msgspec.Raw]
    acknowledged: int  # number of the first item of the other end that has not come


class Channel:
    """Not thread-safe. Items are encoded messages, numbered from 0 on each side."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._unacknowledged: deque[bytes] = deque()
        self._first = 0  # number of the first of them
        self._num_carried = 0  # items that some segment has held
        self._next = 0  # number of the first item that has not come

    @property
    def has_news(self) -> bool:
        """Whether there are items that no segment has held yet."""
        return self._num_carried < self._first + len(self._unacknowledged)

    @property
    def num_unacknowledged(self) -> int:
        return len(self._unacknowledged)

    def send(self, item: bytes) -> None:
        """Puts one encoded message behind those before it."""
        self._unacknowledged.append(item)

    def segment(self) -> Segment:
        """What is to be told now."""
        items: list[msgspec.Raw] = []
        num_bytes = 0
        for item in self._unacknowledged:
            num_bytes += len(item)
            if items and num_bytes > MAX_SEGMENT_BYTES:
                break
            items.append(msgspec.Raw(item))
        self._num_carried = max(self._num_carried, self._first + len(items))
        return Segment(run=self.run, first=self._first, items=items, acknowledged=self._next)

    def receive(self, segment: Segment) -> list[msgspec.Raw]:
        """Takes what the other end tells. Returns its items that are new here, in order; each comes out once.

        Raises ValueError, and changes nothing, for a segment that this channel's other end cannot have sent.
        """
        end = self._first + len(self._unacknowledged)
        if segment.run != self.run or segment.acknowledged > end or segment.first > self._next:
            raise ValueError(
                f"segment of run {segment.run!r}, items {segment.first} on, acknowledging {segment.acknowledged}:"
                f" this is run {self.run!r}, {self._next} items have come and {end} were sent"
            )
        while self._first < segment.acknowledged:
            self._unacknowledged.popleft()
            self._first += 1
        new = segment.items[self._next - segment.first :]
        self._next += len(new)
        return new


encode_segment = msgspec.msgpack.Encoder().encode
decode_segment = msgspec.msgpack.Decoder(Segment).decode
