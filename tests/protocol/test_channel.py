"""Two ends of a channel agree on what was said, whatever becomes of the segments between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ensemble.protocol import channel as channel_module
from ensemble.protocol.channel import Channel, Segment, decode_segment, encode_segment

MAX_BYTES = 40
ENDS = st.sampled_from([0, 1])


@contextmanager
def small_segments() -> Iterator[None]:
    with mock.patch.object(channel_module, "MAX_SEGMENT_BYTES", MAX_BYTES):
        yield


class TwoEnds(RuleBasedStateMachine):
    """Segments are on their way to an end for any time, arrive in any order, again, or never."""

    @initialize()
    def open(self) -> None:
        self.ends = Channel("run"), Channel("run")
        self.sent: tuple[list[bytes], list[bytes]] = [], []
        self.arrived: tuple[list[bytes], list[bytes]] = [], []
        self.on_the_way: tuple[list[bytes], list[bytes]] = [], []  # to each end

    @rule(end=ENDS, sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5))
    def send(self, end: int, sizes: list[int]) -> None:
        for size in sizes:
            item = f"{end}:{len(self.sent[end])}".encode().ljust(size)
            self.sent[end].append(item)
            self.ends[end].send(item)

    @rule(end=ENDS)
    def tell(self, end: int) -> None:
        with small_segments():
            segment = self.ends[end].segment()
        num_bytes, end_of_items = sum(map(len, segment.items)), segment.first + len(segment.items)
        assert len(segment.items) <= 1 or num_bytes <= MAX_BYTES
        assert segment.more == (end_of_items < len(self.sent[end]))
        assert not segment.more or num_bytes + len(self.sent[end][end_of_items]) > MAX_BYTES, "there was room for more"
        self.on_the_way[1 - end].append(encode_segment(segment))

    @rule(end=ENDS)
    def acknowledge(self, end: int) -> None:
        self.on_the_way[1 - end].append(encode_segment(self.ends[end].acknowledgement()))

    @precondition(lambda self: any(self.on_the_way))
    @rule(data=st.data(), stays=st.booleans())
    def arrive(self, data: st.DataObject, stays: bool) -> None:
        end = data.draw(st.sampled_from([end for end in (0, 1) if self.on_the_way[end]]))
        index = data.draw(st.integers(0, len(self.on_the_way[end]) - 1))
        segment = self.on_the_way[end][index]
        if not stays:
            del self.on_the_way[end][index]
        with small_segments():
            self.arrived[end].extend(self.ends[end].receive(decode_segment(segment)))

    @precondition(lambda self: any(self.on_the_way))
    @rule(data=st.data())
    def get_lost(self, data: st.DataObject) -> None:
        end = data.draw(st.sampled_from([end for end in (0, 1) if self.on_the_way[end]]))
        del self.on_the_way[end][data.draw(st.integers(0, len(self.on_the_way[end]) - 1))]

    @rule(end=ENDS, run=st.sampled_from(["run", "other"]), data=st.data())
    def refuse_the_impossible(self, end: int, run: str, data: st.DataObject) -> None:
        """What the other end cannot have said, by run or by either number."""
        num_came, num_sent = len(self.arrived[end]), len(self.sent[end])
        numbers = st.integers(-2, num_came + 3), st.integers(-2, num_sent + 3)
        first, acknowledged = (data.draw(each) for each in numbers)
        if run == "run" and 0 <= first <= num_came and 0 <= acknowledged <= num_sent:
            return
        before = deepcopy(vars(self.ends[end]))
        segment = Segment(run=run, first=first, items=[b"forged"], more=True, acknowledged=acknowledged)
        with pytest.raises(ValueError, match="this is run 'run'"):
            self.ends[end].receive(segment)
        assert vars(self.ends[end]) == before

    @invariant()
    def each_item_once_and_in_order(self) -> None:
        if hasattr(self, "ends"):
            for end in (0, 1):
                assert self.arrived[1 - end] == self.sent[end][: len(self.arrived[1 - end])]

    def teardown(self) -> None:
        """While either end has news, it is enough that each tells it: everything arrives, and there is an end to it."""
        if not hasattr(self, "ends"):
            return
        with small_segments():
            for _ in range(2):  # what was lost before is repeated by the first round, news or not
                self._tell_each_other()
            for _ in range(sum(map(len, self.sent))):
                if not any(end.has_news for end in self.ends):
                    break
                self._tell_each_other()
            assert not any(end.has_news for end in self.ends)
            self._tell_each_other()
        assert self.arrived == (self.sent[1], self.sent[0])
        assert [end.num_unacknowledged for end in self.ends] == [0, 0]

    def _tell_each_other(self) -> None:
        for end in (0, 1):
            self.arrived[1 - end].extend(self.ends[1 - end].receive(self.ends[end].segment()))


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_what_no_segment_has_carried_cannot_be_acknowledged() -> None:
    channel = Channel("run")
    channel.send(b"item")
    forged = Segment(run="run", first=0, items=[], more=False, acknowledged=1)
    with pytest.raises(ValueError, match="acknowledging 1"):
        channel.receive(forged)
    assert channel.segment().items == [b"item"]


def test_news_is_what_no_segment_has_carried() -> None:
    channel = Channel("run")
    assert not channel.has_news
    channel.send(b"item")
    assert channel.has_news
    channel.segment()
    assert not channel.has_news and channel.num_unacknowledged == 1


def test_an_end_that_waits_for_an_acknowledgement_is_told_at_once() -> None:
    """Else what does not fit into one segment would wait for some other news."""
    sender, receiver = Channel("run"), Channel("run")
    with small_segments():
        for _ in range(3):
            sender.send(bytes(MAX_BYTES // 2))
        first = sender.segment()
        assert len(first.items) == 2 and first.more
        assert not sender.has_news, "the same segment again would carry nothing new"
        receiver.receive(first)
        assert receiver.has_news
        sender.receive(receiver.segment())
        assert not receiver.has_news and sender.has_news
        assert len(sender.segment().items) == 1


def test_what_is_acknowledged_makes_room() -> None:
    sender, receiver = Channel("run"), Channel("run")
    with small_segments():
        for _ in range(5):
            for _ in range(2):
                sender.send(bytes(MAX_BYTES // 2))
            assert len(receiver.receive(sender.segment())) == 2
            sender.receive(receiver.segment())
