"""The threads that send. A send waits for the Triton server, so it never runs on the router's thread.

A stream belongs to one of them: what concerns it is put into that thread's inbox as a function, so that its state needs
no lock, and its responses keep their order. While it waits for its turn its tokens gather.

A response costs the machine's cores more than a token does. So a stream rests after each, the longer the more streams
there are, and all of them together send no more responses than the cores carry: beyond that tokens gather.
"""

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from ensemble.errors import DistServeError
from ensemble.request import FinishReason, TokenLogProbs
from ensemble.serving.streams import ClientStream
from ensemble.threads import start_vital_thread

NUM_CORES = len(os.sched_getaffinity(0))
NUM_SENDERS = 1 if NUM_CORES < 4 else 2  # a send of a client of `scheduler` waits 0.24 ms: docs/results/README.md
RESPONSES_PER_CORE_S = 500  # docs/results/README.md
NewToken: TypeAlias = tuple[ClientStream, int, FinishReason | None, TokenLogProbs | None]


class SenderPool:
    """`push` and `flush` are for one thread, the router's; the others may be called from any. The callbacks are called
    on the senders' threads."""

    def __init__(
        self,
        on_answered: Callable[[ClientStream], None],
        on_failure: Callable[[ClientStream, Exception], None],
        on_gaps: Callable[[list[float]], None] = lambda gaps: None,  # seconds between tokens of a request
        num_threads: int = NUM_SENDERS,
        max_responses_per_s: float = RESPONSES_PER_CORE_S * NUM_CORES,
    ) -> None:
        self._senders = [
            _Sender(on_answered, on_failure, on_gaps, f"sender-{i}", max_responses_per_s / num_threads)
            for i in range(num_threads)
        ]
        self._batches: list[list[NewToken]] = [[] for _ in self._senders]

    def push(
        self,
        stream: ClientStream,
        token_id: int,
        finish_reason: FinishReason | None,
        log_probs: TokenLogProbs | None = None,
    ) -> None:
        """Adds a token, which leaves with the next `flush`: one hand-over for all the tokens of a step."""
        self._batches[stream.request_id % len(self._senders)].append((stream, token_id, finish_reason, log_probs))

    def flush(self) -> None:
        for index, batch in enumerate(self._batches):
            if batch:
                self._batches[index] = []
                self._senders[index].put(partial(_Sender.take, self._senders[index], batch))

    def fail(self, stream: ClientStream, error: DistServeError) -> None:
        sender = self._of(stream.request_id)
        sender.put(lambda: sender.fail(stream, error))

    def start(self, streams: Iterable[ClientStream]) -> None:
        """They may send from now on."""
        for stream in streams:
            sender = self._of(stream.request_id)
            sender.put(partial(sender.start, stream))

    def passed(self, numbers: Iterable[tuple[int, int]]) -> None:
        """(request_id, number) of responses that the OpenAI front or the `answer` model has handed over."""
        batches: list[list[tuple[int, int]]] = [[] for _ in self._senders]
        for request_id, number in numbers:
            batches[request_id % len(batches)].append((request_id, number))
        for sender, batch in zip(self._senders, batches, strict=True):
            if batch:
                sender.put(partial(sender.passed, batch))

    def give_up_lost(self) -> None:
        """Lets those go on whose responses are overdue."""
        for sender in self._senders:
            sender.put(sender.give_up_lost)

    def close(self) -> None:
        """Sends what can be sent, then ends the threads."""
        self.flush()
        for sender in self._senders:
            sender.put(sender.close)
        for sender in self._senders:
            sender.thread.join(timeout=1.0)

    def _of(self, request_id: int) -> "_Sender":
        return self._senders[request_id % len(self._senders)]


class _Sender:
    """One thread. `put` is for any other; the other methods are its own."""

    def __init__(
        self,
        on_answered: Callable[[ClientStream], None],
        on_failure: Callable[[ClientStream, Exception], None],
        on_gaps: Callable[[list[float]], None],
        name: str,
        max_responses_per_s: float,
    ) -> None:
        self._max_responses_per_s = max_responses_per_s
        self._on_answered = on_answered
        self._on_failure = on_failure
        self._on_gaps = on_gaps
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: deque[ClientStream] = deque()  # have something to send; by turns
        self._waiting: dict[int, ClientStream] = {}  # request_id |-> stream with a response on its way
        self._resting: deque[tuple[float, ClientStream]] = deque()  # (when it sent, stream), oldest first
        self._is_closing = False
        self.put = self._inbox.put
        self.thread = start_vital_thread(self._run, name)

    def take(self, tokens: list[NewToken]) -> None:
        now, gaps = time.monotonic(), []
        for stream, token_id, finish_reason, log_probs in tokens:
            if stream.last_token_at is not None:
                gaps.append(now - stream.last_token_at)
            stream.last_token_at = now
            stream.push(token_id, finish_reason, log_probs)
            if finish_reason is not None:
                stream.is_resting = False  # the end waits for nobody
            self._go_on(stream)
        if gaps:
            self._on_gaps(gaps)

    def fail(self, stream: ClientStream, error: DistServeError) -> None:
        stream.fail(error)
        stream.is_resting = False
        self._go_on(stream)

    def start(self, stream: ClientStream) -> None:
        stream.is_started = True
        self._go_on(stream)

    def passed(self, numbers: list[tuple[int, int]]) -> None:
        for request_id, number in numbers:
            stream = self._waiting.get(request_id)
            if stream is not None:
                stream.pace.passed(number)
                self._go_on(stream)

    def give_up_lost(self) -> None:
        now = time.monotonic()
        for stream in list(self._waiting.values()):
            stream.pace.give_up(now)
            self._go_on(stream)

    def close(self) -> None:
        self._is_closing = True

    # ----

    def _run(self) -> None:
        while not (self._is_closing and self._inbox.empty() and not self._ready):
            if not self._ready:
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=self._rest_s())()
            while not self._inbox.empty():
                self._inbox.get()()
            while self._resting and (self._is_closing or self._rest_s() == 0.0):
                _, stream = self._resting.popleft()
                stream.is_resting = False
                self._go_on(stream)
            if self._ready:
                stream = self._ready.popleft()
                stream.is_queued = False
                self._send_next(stream)

    def _rest_s(self) -> float | None:
        """How long the stream that has rested longest will rest yet. None: no stream rests."""
        if not self._resting:
            return None
        return max(0.0, self._resting[0][0] + len(self._resting) / self._max_responses_per_s - time.monotonic())

    def _send_next(self, stream: ClientStream) -> None:
        was_closed, has_sent = stream.is_closed, False
        try:
            has_sent = stream.send_next()
        except Exception as error:  # of the Triton server, or a fault of ours: it ends this stream alone
            self._on_failure(stream, error)
        else:
            if stream.is_answered and not was_closed:
                self._on_answered(stream)
        if stream.is_closed or stream.pace.is_clear:
            self._waiting.pop(stream.request_id, None)
        else:
            self._waiting[stream.request_id] = stream
        if has_sent and not stream.is_closed:
            stream.is_resting = True
            self._resting.append((time.monotonic(), stream))

    def _go_on(self, stream: ClientStream) -> None:
        if stream.pace.is_clear:
            self._waiting.pop(stream.request_id, None)
        if stream.may_send and not stream.is_queued:
            stream.is_queued = True
            self._ready.append(stream)
