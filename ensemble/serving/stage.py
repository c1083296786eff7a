"""What the `prefill` and `decode` models do: pass the scheduler's calls on to the workers, and their events back.

One thread owns everything. A call is answered later, once: a command when its number has come and the worker has it
(a prefill batch when it has run), a poll when its replica has events, at the latest after the time it allows.
"""

import math
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import zmq

from ensemble.config import Deployment
from ensemble.errors import ERROR_MARK, ConfigError, DistServeError, InternalError, StageUnavailable
from ensemble.serving.outbox import Outbox
from ensemble.workers.messages import (
    Accepted,
    Command,
    EndWorker,
    LoadFailed,
    Poll,
    PrefillAnswer,
    PrefillBatch,
    ReplicaDown,
    ReplicaUp,
    StartWorker,
    WorkerEvent,
    decode_stage_call,
    decode_worker_event,
    encode,
)
from ensemble.workers.supervisor import Supervisor

Reply = Callable[[bytes | DistServeError], None]
MAX_POLL_S = 1.0
MAX_DETACH_S = 5.0  # a dead worker's readers have this long to close their mappings before it is started again


@dataclass(slots=True, eq=False)
class _Replica:
    outbox: Outbox
    poll: tuple[float, Reply] | None = None  # parked: deadline, reply
    epoch: int = 0
    up: ReplicaUp | None = None
    next_number: int = 0
    early: dict[int, tuple[bytes, Command, Reply]] = field(default_factory=dict)  # commands that overtook another
    batches: dict[int, Reply] = field(default_factory=dict)  # batch_id |-> its parked call


class Stage:
    """One stage's side of the Triton server. `handle` may be called from any thread."""

    def __init__(self, name: Literal["prefill", "decode"], deployment: Deployment) -> None:
        self.name = name
        stage = deployment.prefill if name == "prefill" else deployment.decode
        self._replicas = [_Replica(Outbox(index)) for index in range(stage.num_replicas)]
        self._run_dir = tempfile.TemporaryDirectory(prefix=f"distserve-{name}-")  # mode 0700
        address = f"ipc://{self._run_dir.name}/stage"
        self._context = zmq.Context()
        self._workers = self._context.socket(zmq.ROUTER)
        self._workers.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._workers.bind(address)
        self._wake_address = f"inproc://wake-{id(self)}"
        self._wake_receiver = self._context.socket(zmq.PULL)
        self._wake_receiver.bind(self._wake_address)
        self._wake_lock = threading.Lock()
        self._wake_sender = self._context.socket(zmq.PUSH)
        self._wake_sender.connect(self._wake_address)
        self._calls: queue.SimpleQueue[tuple[bytes, Reply]] = queue.SimpleQueue()
        self._supervisor = Supervisor(name, stage.num_replicas, address, Path(self._run_dir.name))
        self._all_up = threading.Event()
        if not self._replicas:  # of prefill, in colocated mode
            self._all_up.set()
        self._load_failure: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-stage", daemon=True)
        self._thread.start()

    def wait_until_up(self) -> None:
        """Returns when every replica serves. Raises ConfigError with the reason if one cannot start."""
        self._all_up.wait()
        if self._load_failure is not None:
            reason = self._load_failure
            self.close()
            print(f"{ERROR_MARK} {reason}", file=sys.stderr, flush=True)
            raise ConfigError(reason)

    @property
    def is_up(self) -> bool:
        """Whether any replica serves, if there are any."""
        return not self._replicas or any(replica.up is not None for replica in self._replicas)

    def handle(self, payload: bytes, reply: Reply) -> None:
        """Takes one encoded StageCall; `reply` is called once, later, from the stage's thread."""
        self._calls.put((payload, _guarded(reply)))
        self._wake()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._supervisor.stop()
        self._context.destroy(linger=0)
        self._run_dir.cleanup()

    def _wake(self) -> None:
        with self._wake_lock:
            self._wake_sender.send(b"")

    # ---- the stage's thread

    def _run(self) -> None:
        while not self._closing:
            poller = zmq.Poller()
            poller.register(self._wake_receiver, zmq.POLLIN)
            poller.register(self._workers, zmq.POLLIN)
            exit_fds = [worker.exit_fd for worker in self._supervisor.workers if worker is not None]
            for fd in exit_fds:
                poller.register(fd, zmq.POLLIN)
            ready = dict(poller.poll(self._milliseconds_to_next_deadline()))
            while self._workers.poll(0):
                identity, payload = self._workers.recv_multipart()
                self._receive_event(identity, decode_worker_event(payload))
            for fd in exit_fds:
                if fd in ready:
                    self._worker_ended(*self._supervisor.reap(fd))
            while self._wake_receiver.poll(0):
                self._wake_receiver.recv()
            while not self._calls.empty():
                self._receive_call(*self._calls.get())
            self._supervisor.start_due()
            self._answer_polls()
        for replica in self._replicas:
            if replica.poll is not None:
                replica.poll[1](StageUnavailable(self.name, "the server is stopping"))
            self._fail_commands(replica, "the server is stopping")

    def _receive_call(self, payload: bytes, reply: Reply) -> None:
        try:
            call = decode_stage_call(payload)
            replica = dict(enumerate(self._replicas))[call.replica]
        except (ValueError, KeyError) as error:
            reply(InternalError(f"{self.name}: unreadable call: {error}"))
            return
        if isinstance(call, Poll):
            if replica.poll is not None:  # its caller has given it up
                replica.poll[1](encode(Accepted()))
            replica.outbox.confirm(call.last_number)
            replica.poll = time.monotonic() + min(call.max_wait_s, MAX_POLL_S), reply
        elif isinstance(call, StartWorker):
            self._supervisor.allow(call.replica)
            reply(encode(Accepted()))
        elif isinstance(call, EndWorker):
            self._supervisor.kill(call.replica, call.epoch)
            reply(encode(Accepted()))
        elif replica.up is None or call.epoch != replica.epoch:
            reply(StageUnavailable(self.name, f"replica {call.replica} is not up (epoch {call.epoch})"))
        else:
            replica.early[call.number] = (payload, call, reply)
            while replica.next_number in replica.early:
                self._forward(replica, *replica.early.pop(replica.next_number))
                replica.next_number += 1

    def _forward(self, replica: _Replica, payload: bytes, command: Command, reply: Reply) -> None:
        try:
            self._workers.send_multipart([f"{command.replica}:{command.epoch}".encode(), payload])
        except zmq.ZMQError:
            reply(StageUnavailable(self.name, f"the worker of replica {command.replica} is gone"))
            return
        if isinstance(command, PrefillBatch) and self.name == "prefill":
            replica.batches[command.batch_id] = reply
        else:
            reply(encode(Accepted()))

    def _receive_event(self, identity: bytes, event: WorkerEvent) -> None:
        index, epoch = (int(part) for part in identity.split(b":"))
        replica, worker = self._replicas[index], self._supervisor.workers[index]
        if worker is None or worker.epoch != epoch:
            return  # the last words of a worker whose end is known
        match event:
            case LoadFailed(reason=reason):
                self._load_failure = reason
                self._all_up.set()
            case PrefillAnswer(batch_id=batch_id):
                reply = replica.batches.pop(batch_id, None)
                if reply is not None:
                    reply(encode(event))
            case ReplicaUp():
                replica.up, replica.epoch, replica.next_number = event, epoch, 0
                worker.up_at = time.monotonic()
                replica.outbox.add(event)
                print(
                    f"distserve: {self.name} replica {index}: up, {event.num_blocks} KV blocks",
                    file=sys.stderr,
                    flush=True,
                )
                if all(each.up is not None for each in self._replicas):
                    self._all_up.set()
            case _:
                replica.outbox.add(event)

    def _worker_ended(self, index: int, epoch: int, how: str) -> None:
        replica = self._replicas[index]
        replica.epoch = epoch
        if not self._all_up.is_set():  # it never came up: the start has failed
            self._load_failure = self._load_failure or f"{self.name} replica {index}: {how} while loading"
            self._all_up.set()
            return
        delay = self._supervisor.restart_later(index, MAX_DETACH_S if self.name == "prefill" else 0.0)
        print(
            f"distserve: {self.name} replica {index}: {how}; next start in {delay:.1f} s", file=sys.stderr, flush=True
        )
        if replica.up is not None:
            replica.up = None
            replica.outbox.add(ReplicaDown(replica=index, epoch=epoch, reason=how))
        self._fail_commands(replica, how)

    def _fail_commands(self, replica: _Replica, reason: str) -> None:
        for reply in [*replica.batches.values(), *(reply for _, _, reply in replica.early.values())]:
            reply(StageUnavailable(self.name, reason))
        replica.batches.clear()
        replica.early.clear()

    def _answer_polls(self) -> None:
        now = time.monotonic()
        for replica in self._replicas:
            if replica.poll is not None and (replica.outbox or replica.poll[0] <= now):
                (_, reply), replica.poll = replica.poll, None
                reply(encode(replica.outbox.take()))

    def _milliseconds_to_next_deadline(self) -> int:
        deadlines = [replica.poll[0] for replica in self._replicas if replica.poll is not None]
        deadlines += self._supervisor.restart_times
        if not deadlines:
            return 1000
        return math.ceil(max(0.0, min(deadlines) - time.monotonic()) * 1e3)


def _guarded(reply: Reply) -> Reply:
    """An answer that the server does not take harms its caller alone, who sees the call fail."""

    def answer(value: bytes | DistServeError) -> None:
        try:
            reply(value)
        except Exception:
            traceback.print_exc()

    return answer
