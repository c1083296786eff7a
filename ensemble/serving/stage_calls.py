"""The orchestrator's calls into the stages, on threads of their own: commands, and one parked poll for each replica.

One parked call never blocks another: there is a thread for each poll, one for each prefill batch that may be in flight,
and some for the rest.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

from ensemble.workers.messages import (
    Command,
    EndWorker,
    Events,
    Poll,
    PrefillAnswer,
    StartWorker,
    WorkerEvent,
    decode_stage_answer,
    encode,
)

StageName = Literal["prefill", "decode"]
CallModel = Callable[[StageName, bytes], bytes]  # one unary BLS call; raises DistServeError

NUM_CONTROL_THREADS = 4
MAX_BATCHES_IN_FLIGHT = 2  # per prefill replica: pipeline_parallel_size + 1
FAILED_POLL_PAUSE_S = 0.2


class Listener(Protocol):
    """What the calls bring back; called on their threads."""

    def prefilled(self, replica: int, answer: PrefillAnswer) -> None: ...

    def events(self, stage: StageName, replica: int, events: list[WorkerEvent]) -> None: ...

    def lost(self, stage: StageName, replica: int, epoch: int, reason: str) -> None:
        """A command to this life of a worker was lost."""
        ...


class StageCalls:
    """Polls from the start; `send` and `start_worker` return at once."""

    def __init__(self, call_model: CallModel, num_replicas: Mapping[StageName, int], listener: Listener) -> None:
        self._call_model = call_model
        self._listener = listener
        self._closing = threading.Event()
        num_threads = num_replicas["prefill"] * MAX_BATCHES_IN_FLIGHT + NUM_CONTROL_THREADS
        self._commands = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="command")
        # All of them now: a pool grows when no thread is idle, and would do so some time later under load.
        started = threading.Barrier(num_threads)
        for _ in range(num_threads):
            self._commands.submit(started.wait)
        self._polls = [
            threading.Thread(target=self._poll, args=(stage, replica), name=f"poll-{stage}-{replica}", daemon=True)
            for stage, count in num_replicas.items()
            for replica in range(count)
        ]
        for thread in self._polls:
            thread.start()

    def send(self, stage: StageName, command: Command) -> None:
        """Commands of one life of a worker are numbered by the caller: the stage keeps their order."""
        if not self._closing.is_set():
            self._commands.submit(self._send, stage, command)

    def start_worker(self, replica: int) -> None:
        """Lets the prefill stage start the next life of a dead worker."""
        if not self._closing.is_set():
            self._commands.submit(self._call_model, "prefill", encode(StartWorker(replica=replica)))

    def close(self) -> None:
        self._closing.set()
        for thread in self._polls:
            thread.join(timeout=2.0)
        self._commands.shutdown(wait=False, cancel_futures=True)

    def _send(self, stage: StageName, command: Command) -> None:
        """A prefill batch's call returns when the batch has run."""
        try:
            answer = decode_stage_answer(self._call_model(stage, encode(command)))
        except Exception as error:
            reason = str(error).removeprefix(f"{stage} is unavailable: ")  # which is said again to the client
            self._listener.lost(stage, command.replica, command.epoch, reason)
            # The worker, if it lives, would wait for this number for ever.
            with contextlib.suppress(Exception):
                self._call_model(stage, encode(EndWorker(replica=command.replica, epoch=command.epoch)))
            return
        if isinstance(answer, PrefillAnswer):
            self._listener.prefilled(command.replica, answer)

    def _poll(self, stage: StageName, replica: int) -> None:
        last_number = 0
        while not self._closing.is_set():
            try:
                poll = encode(Poll(replica=replica, last_number=last_number))
                answer = decode_stage_answer(self._call_model(stage, poll))
            except Exception:  # the server does not let calls through: it starts, or stops
                self._closing.wait(FAILED_POLL_PAUSE_S)
                continue
            if isinstance(answer, Events):
                last_number = answer.number
                if answer.events:
                    self._listener.events(stage, replica, answer.events)
