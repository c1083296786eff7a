"""What router and stage tell each other arrives once and in order, at once, whatever becomes of the calls."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from ensemble.errors import InternalError
from ensemble.protocol.channel import Channel, decode_segment, encode_segment
from ensemble.protocol.router_replica import FromStage, ReplicaDown, StartReplica, decode_to_stage, encode
from ensemble.serving.exchange import NUM_THREADS, RETRY_PAUSE_S, Exchange

DEADLINE_S = 30.0


class FarEnd:
    """The other end of an exchange: parks the newest call, and loses calls and answers as it is told to."""

    def __init__(self, park_s: float = 2 * DEADLINE_S) -> None:
        self.park_s = park_s
        self.faults: Iterator[str] = itertools.repeat("none")  # of the calls to come
        self.items: list[int] = []  # that have come
        self.arrived: list[FromStage] = []  # at the exchange
        self.num_calls = 0
        self.num_parked = 0
        self.changed = threading.Condition()
        self._channel = Channel("run")
        self._newest = 0

    def call(self, stage: str, payload: bytes) -> bytes:
        with self.changed:
            self.num_calls += 1
            self.changed.notify_all()
            fault = next(self.faults)
            if fault == "call is lost":
                raise InternalError("lost")
            for item in self._channel.receive(decode_segment(payload)):
                start = decode_to_stage(item)
                assert isinstance(start, StartReplica)
                self.items.append(start.replica)
            number = self._newest = self._newest + 1
            self.num_parked += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._newest != number or self._channel.has_news, self.park_s)
            self.num_parked -= 1
            is_newest = self._newest == number
            answer = encode_segment(self._channel.segment() if is_newest else self._channel.acknowledgement())
        if fault == "answer is lost":
            raise InternalError("lost")
        return answer

    def send(self, *items: bytes) -> None:
        with self.changed:
            for item in items:
                self._channel.send(item)
            self.changed.notify_all()

    def on_items(self, items: list[FromStage]) -> None:
        with self.changed:
            self.arrived += items
            self.changed.notify_all()

    def wait_until(self, condition: str) -> None:
        """Python over this object's attributes."""
        with self.changed:
            assert self.changed.wait_for(lambda: eval(condition, {}, vars(self)), DEADLINE_S), condition

    def end(self) -> None:
        with self.changed:
            self.park_s = 0
            self._newest += 1
            self.changed.notify_all()


@contextmanager
def exchange(far_end: FarEnd) -> Iterator[Exchange]:
    exchange = Exchange("decode", "run", far_end.call, far_end.on_items)
    try:
        yield exchange
    finally:
        exchange._closing.set()
        far_end.end()
        exchange.close()
        assert not any(thread.is_alive() for thread in exchange._threads)


def down(number: int) -> ReplicaDown:
    return ReplicaDown(replica=number, life=0, reason="")


def test_one_call_is_parked_while_nobody_has_anything_to_say() -> None:
    far_end = FarEnd()
    with exchange(far_end):
        far_end.wait_until("num_parked == 1")
        assert far_end.num_calls == 1


def test_what_either_end_says_does_not_wait_for_the_parked_call_to_end() -> None:
    far_end = FarEnd()
    with exchange(far_end) as near_end:
        for number in range(5):
            near_end.send(StartReplica(replica=number))
            far_end.wait_until(f"len(items) == {number + 1}")
            far_end.send(encode(down(number)))
            far_end.wait_until(f"len(arrived) == {number + 1}")
        assert far_end.num_calls <= 1 + 2 * 5, "one for each item of ours, one after each of theirs"
    assert far_end.items == list(range(5))
    assert far_end.arrived == list(map(down, range(5)))


def test_a_call_is_parked_again_after_each_answer() -> None:
    far_end = FarEnd(park_s=0.01)
    with exchange(far_end):
        far_end.wait_until("num_calls == 20")


@pytest.mark.parametrize("seed", range(3))
def test_everything_arrives_once_and_in_order_whatever_is_lost(seed: int) -> None:
    generator = random.Random(seed)
    far_end = FarEnd(park_s=0.05)
    far_end.faults = iter(lambda: generator.choice(["none", "none", "none", "call is lost", "answer is lost"]), "")
    with exchange(far_end) as near_end:
        for number in range(40):
            near_end.send(StartReplica(replica=number))
            far_end.send(encode(down(number)))
            if generator.random() < 0.3:
                far_end.wait_until(f"num_calls > {far_end.num_calls}")
        far_end.wait_until("len(items) == len(arrived) == 40")
    assert far_end.items == list(range(40))
    assert far_end.arrived == list(map(down, range(40)))


def test_what_a_lost_call_carried_does_not_wait_for_the_parked_one() -> None:
    far_end = FarEnd()
    with exchange(far_end) as near_end:
        far_end.wait_until("num_parked == 1")
        far_end.faults = itertools.chain(["call is lost"], itertools.repeat("none"))
        near_end.send(StartReplica(replica=7))
        far_end.wait_until("items == [7]")


def test_an_item_that_cannot_be_read_harms_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    far_end = FarEnd()
    with exchange(far_end):
        far_end.send(encode(down(1)), b"\xc1", msgspec.msgpack.encode({"type": "Nonsense"}), b"", encode(down(2)))
        far_end.wait_until("len(arrived) == 2")
        far_end.send(encode(down(3)))
        far_end.wait_until("len(arrived) == 3")
    assert far_end.arrived == [down(1), down(2), down(3)]
    assert capsys.readouterr().err.count("distserve: unreadable item of decode, dropped") == 3


def test_while_calls_fail_few_are_made_and_one_line_tells(capsys: pytest.CaptureFixture[str]) -> None:
    far_end = FarEnd()
    with exchange(far_end) as near_end:
        far_end.send(encode(down(1)))
        far_end.wait_until("len(arrived) == 1 and num_parked == 1")
        capsys.readouterr()
        far_end.faults = itertools.repeat(
            "call is lost"
        )  # but not the parked one: a call that comes back ends the failing
        calls_before, started = far_end.num_calls, time.monotonic()
        for number in range(10):
            near_end.send(StartReplica(replica=number))
        far_end.wait_until(f"num_calls >= {calls_before + 9}")
        num_calls, passed_s = far_end.num_calls - calls_before, time.monotonic() - started
        assert num_calls <= NUM_THREADS * (1 + passed_s / RETRY_PAUSE_S)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distserve: ")]
    assert told == ["distserve: calls to decode fail: internal error: lost"]


def test_a_stage_that_answers_for_another_run_is_not_believed() -> None:
    far_end = FarEnd()
    answers = iter([encode_segment(Channel("another run").segment())])

    def call(stage: str, payload: bytes) -> bytes:
        forged = next(answers, None)
        return far_end.call(stage, payload) if forged is None else forged

    exchange = Exchange("decode", "run", call, far_end.on_items)
    far_end.send(encode(down(1)))
    far_end.wait_until("len(arrived) == 1")
    exchange._closing.set()
    far_end.end()
    exchange.close()
    assert far_end.arrived == [down(1)]


def test_close_does_not_wait_for_ever_for_a_stage_that_does_not_answer() -> None:
    far_end = FarEnd()
    exchange = Exchange("decode", "run", far_end.call, far_end.on_items)
    far_end.wait_until("num_parked == 1")
    exchange.close()
    far_end.end()
