"""The threads that send. A send waits for the Triton server, so it never runs on the router's thread.

A stream belongs to one of them: what concerns it is put into that thread's inbox as a function, so that its state needs
no lock, and its responses keep their order. While it waits for its turn its tokens gather.
"""

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

NUM_SENDERS = 1  # docs/results/README.md: on two cores, more responses of fewer tokens are fewer tokens in all
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
    ) -> None:
        self._senders = [_Sender(on_answered, on_failure, on_gaps, f"sender-{i}") for i in range(num_threads)]
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

    def heartbeat(self, stream: ClientStream) -> None:
        """Sends one, unless a response is on its way."""
        sender = self._of(stream.request_id)
        sender.put(lambda: sender.heartbeat(stream))

    def passed(self, numbers: Iterable[tuple[int, int]]) -> None:
        """(request_id, number) of responses that have come through the ensemble."""
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
    ) -> None:
        self._on_answered = on_answered
        self._on_failure = on_failure
        self._on_gaps = on_gaps
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: deque[ClientStream] = deque()  # have something to send; by turns
        self._waiting: dict[int, ClientStream] = {}  # request_id |-> stream with a response on its way
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
            if not stream.is_queued and stream.may_send:
                self._queue(stream)
        if gaps:
            self._on_gaps(gaps)

    def fail(self, stream: ClientStream, error: DistServeError) -> None:
        stream.fail(error)
        if not stream.is_queued:
            self._queue(stream)

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

    def heartbeat(self, stream: ClientStream) -> None:
        if stream.pace.is_clear and not stream.is_closed:
            self._do(stream, stream.send_heartbeat)

    def close(self) -> None:
        self._is_closing = True

    # ----

    def _run(self) -> None:
        while not (self._is_closing and self._inbox.empty() and not self._ready):
            if not self._ready:
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            if self._ready:
                stream = self._ready.popleft()
                stream.is_queued = False
                self._do(stream, stream.send_next)

    def _do(self, stream: ClientStream, send: Callable[[], None]) -> None:
        was_closed = stream.is_closed
        try:
            send()
        except Exception as error:  # of the Triton server, or a fault of ours: it ends this stream alone
            self._on_failure(stream, error)
        else:
            if stream.is_answered and not was_closed:
                self._on_answered(stream)
        if stream.is_closed or stream.pace.is_clear:
            self._waiting.pop(stream.request_id, None)
        else:
            self._waiting[stream.request_id] = stream

    def _queue(self, stream: ClientStream) -> None:
        stream.is_queued = True
        self._ready.append(stream)

    def _go_on(self, stream: ClientStream) -> None:
        if stream.pace.is_clear:
            self._waiting.pop(stream.request_id, None)
            if not stream.is_queued and stream.has_news:
                self._queue(stream)
