"""The router's end of its channel to a stage: unary BLS calls, each of which carries a segment and brings one back.

    call     news of the router, or nothing in flight ---------> the stage parks the newest call
    answer   news of the stage; a newer call; or after a second <-- it

One call is always on its way to be parked, so that the stage can speak, and one goes out whenever the router has
something to say. Which of them arrives, and when, is of no matter to the channel; a call that fails is made again.
"""

import sys
import threading
from collections.abc import Callable, Iterator

from ensemble.config import StageName
from ensemble.protocol.channel import Channel, Segment, decode_segment, encode_segment
from ensemble.protocol.router_replica import FromStage, ToStage, decode_from_stage, encode
from ensemble.threads import start_vital_thread

CallModel = Callable[[StageName, bytes], bytes]  # one unary BLS call; raises DistServeError

NUM_THREADS = 3  # one's call is parked, one's carries news, and one's is being answered
RETRY_PAUSE_S = 0.2


class Exchange:
    """Calls from the start; fails, and tries again, until the Triton server lets calls through.

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
            thread.join(timeout=2.0)  # a parked call returns after a second

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
                self._on_items(list(self._decoded(items)))
        return True

    def _decoded(self, items: list[bytes]) -> Iterator[FromStage]:
        for item in items:
            try:
                yield decode_from_stage(item)
            except ValueError as error:  # it harms no other
                print(f"distserve: unreadable item of {self._stage}, dropped: {error}", file=sys.stderr, flush=True)

    def _failed(self, error: Exception) -> None:
        """Tells the operator once, until a call comes back."""
        with self._changed:
            is_known, self._is_failing = self._is_failing, True
        if not is_known and not self._closing.is_set():
            print(f"distserve: calls to {self._stage} fail: {error}", file=sys.stderr, flush=True)
