"""What the `prefill` and `decode` models do: pass the router's commands on to the replicas, and their events back.

    router --Exchange, calls with segments--> Home --ZeroMQ--> worker process of each replica
    to a worker    [command, payload]  [reset, life]
    of a worker    [up, life, ReplicaUp]  [failed, life, reason]  [event, life, payload]

One thread owns everything.
"""

import math
import os
import queue
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import zmq

from ensemble.config import Deployment, StageName
from ensemble.errors import NO_RAY, ConfigError
from ensemble.operator_log import tell_operator
from ensemble.protocol.curve import guard
from ensemble.protocol.router_replica import (
    AddReplica,
    FromReplica,
    RemoveReplica,
    ReplicaDown,
    ReplicaUp,
    ReplicaWaits,
    StartReplica,
    ToReplica,
    ToStage,
)
from ensemble.replicas.launchers.base import Launcher
from ensemble.replicas.launchers.local import LocalLauncher
from ensemble.replicas.progress import HangWatch
from ensemble.replicas.supervisor import Supervisor, Worker
from ensemble.serving import secret
from ensemble.serving.exchange import ParkedEnd, Reply
from ensemble.threads import start_vital_thread

WATCH_INTERVAL_S = 0.5
MAX_QUEUED_COMMANDS = 10_000  # that a worker has not taken; one more, and it counts as hung


class Home:
    """One stage's side of the Triton server. `handle` may be called from any thread."""

    def __init__(self, name: StageName, deployment: Deployment) -> None:
        self.name = name
        replicas, first = deployment.prefill.replicas, 0
        if name == "decode":  # ids are unique over the fleet
            replicas, first = deployment.decode.replicas, len(replicas)
        self._run_dir = tempfile.TemporaryDirectory(prefix=f"distserve-{name}-")  # mode 0700
        self._context = zmq.Context()
        self._workers = self._context.socket(zmq.ROUTER)
        self._workers.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._workers.setsockopt(zmq.SNDHWM, MAX_QUEUED_COMMANDS)
        self._calls: queue.SimpleQueue[tuple[bytes, Reply]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0)
        self._router = ParkedEnd(name)
        self._up: dict[int, ReplicaUp] = {}  # replica |-> its present life, if that serves
        self._loading: set[int] = set()  # replicas that have never served
        self._removed: set[int] = set()  # that are still to end
        self._waiting: dict[int, str] = {}  # replica |-> for what, as the router was told
        self._watch = HangWatch(deployment.hang_timeout_s)
        self._watch_at = 0.0  # time.monotonic()
        self._started = threading.Event()  # every replica serves, or one cannot
        self._load_failure: str | None = None
        self._closing = False
        launcher = self._launcher(deployment)
        self._supervisor = Supervisor(name, launcher.bind(self._workers), launcher)
        for replica, devices in enumerate(replicas, first):
            self._add(replica, devices)
        if not self._loading:  # prefill's, in colocated mode
            self._started.set()
        self._thread = start_vital_thread(self._run, f"{name}-stage")

    def _launcher(self, deployment: Deployment) -> Launcher:
        """Raises ConfigError if the deployment's cannot be used here."""
        if deployment.launcher == "local":
            return LocalLauncher(Path(self._run_dir.name))
        try:
            from ensemble.replicas.launchers.ray_cluster import RayLauncher
        except ImportError:
            raise ConfigError(NO_RAY) from None
        key = secret.curve_key()
        guard(self._context, key)
        return RayLauncher(deployment, self.name, key)

    def wait_until_up(self) -> None:
        """Returns when every replica serves. Raises ConfigError with the reason if one cannot start."""
        self._started.wait()
        if self._load_failure is not None:
            reason = self._load_failure
            self.close()
            tell_operator(f"error: {reason}")
            raise ConfigError(reason)

    @property
    def is_up(self) -> bool:
        """Whether any replica serves, if there are any."""
        return bool(self._up) or not self._supervisor.num_replicas

    def handle(self, payload: bytes, reply: Reply) -> None:
        """Takes one encoded Segment; `reply` is called once, later, from the stage's thread."""
        self._calls.put((payload, reply))
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        self._supervisor.stop()
        self._context.destroy(linger=0)
        os.close(self._wake_fd)
        self._run_dir.cleanup()

    # ---- the stage's thread

    def _run(self) -> None:
        while not self._closing:
            workers = self._supervisor.workers
            poller = zmq.Poller()
            poller.register(self._workers, zmq.POLLIN)
            for fd in [self._wake_fd, *(worker.processes.exit_fd for worker in workers.values())]:
                poller.register(fd, zmq.POLLIN)
            ready = dict(poller.poll(self._milliseconds_to_next_deadline()))
            self._receive_from_workers()
            for replica, worker in workers.items():
                if worker.processes.exit_fd in ready:
                    self._ended(replica, *self._supervisor.reap(replica))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            while not self._calls.empty():
                self._receive_call(*self._calls.get())
            self._supervisor.start_due()
            self._router.answer()
            if time.monotonic() >= self._watch_at:
                self._kill_the_hung()
                self._tell_who_waits()
        while not self._calls.empty():
            self._router.receive(*self._calls.get())
        self._router.end_run("the server is stopping")

    def _milliseconds_to_next_deadline(self) -> int:
        now = time.monotonic()
        deadline = min(self._watch_at, self._router.deadline, *self._supervisor.restart_times)
        return math.ceil(max(0.0, deadline - now) * 1e3)

    def _receive_call(self, payload: bytes, reply: Reply) -> None:
        last_run = self._router.run
        items = self._router.receive(payload, reply)
        if self._router.run != last_run:
            self._begin_run(is_first=last_run is None)
        for item in items:
            self._receive_item(item)

    def _begin_run(self, is_first: bool) -> None:
        """The replicas that are up begin new lives, in which no request of the run before lives on."""
        self._waiting.clear()
        for replica, up in list(self._up.items()):  # others have been told nothing in their present life
            if is_first:
                self._router.send(up)
            else:
                del self._up[replica]
                self._send(replica, [b"reset", b"%d" % self._supervisor.new_life(replica)])

    def _receive_item(self, item: ToStage) -> None:
        match item:
            case ToReplica(replica=replica, life=life, command=command):
                if replica in self._up and self._up[replica].life == life:
                    self._send(replica, [b"command", bytes(command)])
            case StartReplica(replica=replica):
                self._supervisor.allow(replica)
            case AddReplica(replica=replica, device=device):
                if replica in self._supervisor:
                    self._log(f"replica {replica} is there already, and not added")
                else:
                    self._add(replica, device)
            case RemoveReplica(replica=replica):
                self._remove(replica)

    # ---- the replicas

    def _add(self, replica: int, devices: str) -> None:
        """`devices` of its ranks, joined by commas."""
        self._loading.add(replica)
        self._supervisor.add(replica, tuple(devices.split(",")))

    def _remove(self, replica: int) -> None:
        if replica in self._supervisor.workers:
            self._removed.add(replica)
            self._supervisor.kill(replica, "it was removed")
        elif replica in self._supervisor:
            self._forget(replica, "it was removed")

    def _forget(self, replica: int, reason: str) -> None:
        self._removed.discard(replica)
        self._loading.discard(replica)
        life = self._supervisor.remove(replica)
        self._log(f"replica {replica}: {reason}; it is not started again")
        self._router.send(ReplicaDown(replica=replica, life=life, reason=reason, is_final=True))

    def _send(self, replica: int, frames: list[bytes]) -> None:
        worker = self._supervisor.workers.get(replica)
        if worker is None:
            return
        try:
            self._workers.send_multipart([worker.identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            self._supervisor.kill(replica, f"{worker.name} took no commands")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # its connection has ended; so will the process
                raise

    def _receive_from_workers(self) -> None:
        replicas = {
            identity: replica for replica, worker in self._supervisor.workers.items() for identity in worker.identities
        }
        while self._workers.poll(0):
            identity, *frames = self._workers.recv_multipart()
            replica = replicas.get(identity)
            if replica is None or len(frames) != 3:
                continue  # the last words of a process whose end is known
            worker = self._supervisor.workers[replica]
            kind, life, payload = frames
            if life != b"%d" % worker.life:
                continue  # of a life before a reset
            if kind == b"event" and replica in self._up:
                self._router.send(FromReplica(replica=replica, life=worker.life, event=msgspec.Raw(payload)))
            elif kind == b"up" and replica not in self._up:
                self._came_up(replica, worker, payload)
            elif kind == b"failed":
                self._supervisor.kill(replica, payload.decode(errors="replace"))
                self._fail_start(payload.decode(errors="replace"))

    def _came_up(self, replica: int, worker: Worker, payload: bytes) -> None:
        try:
            up = _decode_up(payload)
            if (up.replica, up.life) != (replica, worker.life):
                raise ValueError(f"replica {up.replica}, life {up.life} instead of {replica}, {worker.life}")
        except ValueError as error:
            self._supervisor.kill(replica, f"{worker.name} came up unreadably: {error}")
            return
        up = msgspec.structs.replace(up, node=worker.processes.node)
        self._up[replica] = up
        worker.up_at = worker.up_at or time.monotonic()
        self._loading.discard(replica)
        where = f" on node {up.node}" if up.node else ""
        self._log(f"replica {replica}: up{where}, {up.num_blocks} KV blocks")
        self._router.send(up)
        if not self._loading:
            self._started.set()

    def _kill_the_hung(self) -> None:
        """Those that have served, and beat no more. Their ends are told when they have exited."""
        now = time.monotonic()
        self._watch_at = now + WATCH_INTERVAL_S
        progresses = {
            (replica, worker.name, rank): progress
            for replica, worker in self._supervisor.workers.items()
            if worker.up_at is not None and worker.end_reason is None
            for rank, progress in enumerate(worker.processes.progress)
        }
        for (replica, name, _), seconds in self._watch.hung(progresses, now).items():
            self._supervisor.kill(replica, f"{name} made no progress for {seconds:.1f} s")

    def _tell_who_waits(self) -> None:
        for replica, worker in self._supervisor.workers.items():
            waits_for = worker.processes.waits_for
            if waits_for and self._waiting.get(replica) != waits_for:
                self._log(f"replica {replica} waits for {waits_for}")
                self._router.send(ReplicaWaits(replica=replica, waits_for=waits_for))
            self._waiting[replica] = waits_for

    def _ended(self, replica: int, life: int, reason: str) -> None:
        was_up = self._up.pop(replica, None) is not None
        self._fail_start(f"{self.name} replica {replica}: {reason} while loading")
        if replica in self._removed or replica in self._loading:
            self._forget(replica, reason)
            return
        delay = self._supervisor.restart_later(replica)
        self._log(f"replica {replica}: {reason}; next start in {delay:.1f} s")
        if was_up:
            self._router.send(ReplicaDown(replica=replica, life=life, reason=reason))

    def _fail_start(self, reason: str) -> None:
        """Until every replica serves, one that cannot is the end of the start."""
        if not self._started.is_set():
            self._load_failure = reason
            self._started.set()

    def _log(self, line: str) -> None:
        tell_operator(f"{self.name} {line}")


_decode_up = msgspec.msgpack.Decoder(ReplicaUp).decode
