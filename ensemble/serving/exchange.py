"""Router and stage speak by unary BLS calls, each of which carries a segment of a channel and brings one back.

    call     news of the router, or nothing in flight ---------> the stage parks the newest call
    answer   news of the stage; a newer call; or after a while <-- it

One call is always on its way to be parked, so that the stage can speak, and one goes out whenever the router has
something to say. Which of them arrives, and when, is of no matter to the channel; a call that fails is made again.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from ensemble.config import StageName
from ensemble.errors import DistServeError, InternalError, StageUnavailable
from ensemble.operator_log import log_exception, tell_operator
from ensemble.protocol.channel import Channel, Segment, decode_segment, encode_segment
from ensemble.protocol.router_replica import FromStage, ToStage, decode_from_stage, decode_to_stage, encode
from ensemble.threads import start_vital_thread

CallModel = Callable[[StageName, bytes], bytes]  # one unary BLS call; raises DistServeError
Reply = Callable[[bytes | DistServeError], None]
Item = TypeVar("Item")

MAX_PARKED = 2  # calls
NUM_THREADS = MAX_PARKED + 1  # one's call carries news
RETRY_PAUSE_S = 0.2
MAX_PARK_S = 0.25  # a server that stops waits for parked calls
STARTING_S = 10.0  # calls that fail so long after the start are told of
REPEAT_S = 0.1  # after that an answer that is not acknowledged is taken for lost


class Exchange:
    """The router's end. Calls from the start; fails, and tries again, until the Triton server lets calls through.

    `on_items` gets what the stage says, exactly once and in order. It is called by the exchange's threads under their
    lock and must return at once. `run` is another string for each start of the router.
    """

    def __init__(
        self, stage: StageName, run: str, call_model: CallModel, on_items: Callable[[list[FromStage]], None]
    ) -> None:
        self._stage = stage
        self._call_model = call_model
        self._on_items = on_items
        self._channel = Channel(run)
        self._num_in_flight = 0
        self._is_failing = True  # as calls do while the server starts
        self._tell_at = time.monotonic() + STARTING_S  # of failing; infinite: the operator has been told
        self._changed = threading.Condition()  # guards all of the above
        self._closing = threading.Event()
        self._threads = [start_vital_thread(self._run, f"{stage}-exchange-{index}") for index in range(NUM_THREADS)]

    def send(self, item: ToStage) -> None:
        """From any thread; never blocks. Items arrive in the order of the calls."""
        encoded = encode(item)
        with self._changed:
            self._channel.send(encoded)
            self._changed.notify()

    def close(self) -> None:
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=2.0)

    # ---- the threads

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._changed:
                self._changed.wait_for(self._is_call_due)
                segment = self._channel.segment()
                self._num_in_flight += 1
            while not self._closing.is_set() and not self._call(segment):
                self._closing.wait(RETRY_PAUSE_S)
                with self._changed:
                    segment = self._channel.segment()

    def _is_call_due(self) -> bool:
        return self._closing.is_set() or self._num_in_flight == 0 or self._channel.has_news

    def _call(self, segment: Segment) -> bool:
        """Whether it came back. This thread then calls again before the router's has handled what came."""
        try:
            answer = decode_segment(self._call_model(self._stage, encode_segment(segment)))
        except Exception as error:  # the server starts or stops, or the stage refuses
            self._failed(error)
            return False
        with self._changed:
            try:
                items = self._channel.receive(answer)
            except ValueError as error:
                self._failed(error)
                return False
            self._num_in_flight -= 1
            self._is_failing = False
            if items:
                self._on_items(list(_readable(items, decode_from_stage, self._stage)))
        return True

    def _failed(self, error: Exception) -> None:
        """Tells the operator once, until a call comes back."""
        with self._changed:
            if not self._is_failing:
                self._is_failing, self._tell_at = True, 0.0
            is_to_be_told = time.monotonic() >= self._tell_at
            if is_to_be_told:
                self._tell_at = math.inf
        if is_to_be_told and not self._closing.is_set():
            tell_operator(f"calls to {self._stage} fail: {error}")


class ParkedEnd:
    """The stage's end, of one run of the router after another. Not thread-safe."""

    def __init__(self, stage: StageName) -> None:
        self._stage = stage
        self._channel: Channel | None = None  # to the present run
        self._ended_runs: set[str] = set()
        self._parked: deque[tuple[float, Reply]] = deque()  # time.monotonic() when each is to be answered

    @property
    def run(self) -> str | None:
        """The router's present one; None: it has not called yet."""
        return self._channel.run if self._channel is not None else None

    @property
    def deadline(self) -> float:
        """When (time.monotonic()) `answer` has something to do, if there is no news before."""
        return min((deadline for deadline, _ in self._parked), default=float("inf"))

    def receive(self, payload: bytes, reply: Reply) -> list[ToStage]:
        """Takes a call, of a new run perhaps; returns what is new in it. `reply` is called once, sooner or later."""
        reply = _guarded(reply)
        try:
            segment = decode_segment(payload)
            if segment.run in self._ended_runs:
                raise ValueError(f"run {segment.run!r} of the router has ended")
            channel = self._channel
            if channel is None or channel.run != segment.run:
                channel = Channel(segment.run)
            items = channel.receive(segment)
        except ValueError as error:
            reply(InternalError(f"{self._stage}: {error}"))
            return []
        if channel is not self._channel:
            self.end_run("the router has started anew")
            self._channel = channel
        elif len(self._parked) == MAX_PARKED:
            self._parked.popleft()[1](encode_segment(channel.acknowledgement()))
        self._parked.append((time.monotonic() + (REPEAT_S if channel.num_unacknowledged else MAX_PARK_S), reply))
        return list(_readable(items, decode_to_stage, "the router"))

    def send(self, item: FromStage) -> None:
        """To the present run, if there is one."""
        if self._channel is not None:
            self._channel.send(encode(item))

    def answer(self) -> None:
        """Answers a parked call if there is news, and those that have waited long enough."""
        now = time.monotonic()
        while self._parked and self._channel is not None and (self._channel.has_news or self.deadline <= now):
            _, reply = self._parked.popleft()
            reply(encode_segment(self._channel.segment()))
            if self._channel.num_unacknowledged:  # that may have been lost
                self._parked = deque((min(deadline, now + REPEAT_S), each) for deadline, each in self._parked)

    def end_run(self, reason: str) -> None:
        """Nothing is heard of the present run, or said to it, any more."""
        for _, reply in self._parked:
            reply(StageUnavailable(self._stage, reason))
        if self._channel is not None:
            self._ended_runs.add(self._channel.run)
        self._channel = None
        self._parked.clear()


def _readable(items: list[bytes], decode: Callable[[bytes], Item], sender: str) -> Iterator[Item]:
    """An item that cannot be read harms no other."""
    for item in items:
        try:
            yield decode(item)
        except ValueError as error:
            tell_operator(f"unreadable item of {sender}, dropped: {error}")


def _guarded(reply: Reply) -> Reply:
    """An answer that the server does not take harms its caller alone, who sees the call fail."""

    def answer(value: bytes | DistServeError) -> None:
        try:
            reply(value)
        except Exception:
            log_exception()

    return answer
