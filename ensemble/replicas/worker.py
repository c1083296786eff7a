"""The process of a rank of a replica: the first serves its stage over ZeroMQ, the others follow it, until the stage
goes away.

    python -m ensemble.replicas.worker HOME REPLICA LIFE RANK DEVICES STAGE_ADDRESS PEER_ADDRESS GROUP_ADDRESS \
        ALIVE_FD PROGRESS_FD

DEVICES are those of all ranks, by commas. PEER_ADDRESS is where other replicas find this one, GROUP_ADDRESS where the
ranks meet. The deployment file is named by the environment. ALIVE_FD is a pipe that whoever started the worker holds
open: its end means that the stage is gone, whichever way it went, and the worker must not outlive it.

    stage -> worker   [b"command", Command]   [b"reset", life]
    worker -> stage   [b"up", life, ReplicaUp]   [b"failed", life, reason]   [b"event", life, Event]
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
import zmq

from ensemble.config import Deployment, StageName
from ensemble.engine.engine import load_engine, use_device
from ensemble.engine.timing import time_steps
from ensemble.errors import ConfigError
from ensemble.interpreter import settle_interpreter
from ensemble.models.fingerprint import fingerprint
from ensemble.operator_log import log_exception, tell_operator
from ensemble.parallel.group import LOOPBACK, meet
from ensemble.protocol.curve import CurveKey, connect, guard
from ensemble.protocol.leader_follower import orders_address
from ensemble.protocol.router_replica import Event, ReplicaUp, decode_command, encode
from ensemble.replicas.follower import Follower, connect_to_leader
from ensemble.replicas.followers import Followers
from ensemble.replicas.group_parts import GroupLeases, GroupPeers
from ensemble.replicas.loop import EngineLoop
from ensemble.replicas.loop_settings import loop_settings
from ensemble.replicas.peer_server import PeerServer, pool_layout
from ensemble.replicas.peers import Peers
from ensemble.replicas.progress import Progress
from ensemble.transfer.leases import FollowedLeases, Leases

GPU_POLL_S = 1e-4  # a millisecond, the shortest wait of a ZeroMQ poll, would be a tenth of a short prompt's TTFT
IDLE_POLL_MS = 500  # between two beats of an idle loop
MAX_UNSENT = 100_000  # events that the stage has not taken: it hangs
LAST_WORD_MS = 5_000  # for the stage to take why a worker cannot serve
ORDERS = "orders"  # by this name the leader publishes where it gives them
LOAD_TIMEOUT_S = 1800.0  # of a rank, after the first one
# On a CPU: tokens leave before more are computed. On two cores 64 streams have gaps of 150 instead of 240 ms at P99.
NICENESS = 5


def main() -> None:
    home, replica, life, rank_text, devices, stage_address, peer_address, group_address, *fds = sys.argv[1:]
    rank, device_names = int(rank_text), devices.split(",")
    alive_fd, progress_fd = map(int, fds)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    threading.Thread(target=_exit_with_the_stage, args=(alive_fd,), daemon=True).start()

    context, key = zmq.Context(), CurveKey.from_environment()
    guard(context, key)
    to_stage = zmq.Context()  # apart, so that it ends without all else, which has threads in it
    socket = to_stage.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, MAX_UNSENT)
    socket.identity = f"{replica}:{life}{f':{rank}' if rank else ''}".encode()
    if key is not None:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        threading.Thread(target=_exit_without_connection, args=(monitor,), daemon=True).start()
    connect(socket, stage_address, key)
    deployment = Deployment.from_environment()
    stage_name: StageName = "prefill" if home == "prefill" else "decode"
    stage = deployment.stage(stage_name)
    device = torch.device(device_names[rank])
    if device.type == "cpu":
        os.nice(NICENESS)
        torch.set_num_threads(stage.num_threads or cpu_threads(deployment))
    progress = Progress(progress_fd)
    try:
        if len(device_names) != stage.num_ranks:
            raise ConfigError(f"devices = {devices}: a replica of {stage_name} has {stage.num_ranks} ranks")
        use_device(device)
        host = urlsplit(peer_address).hostname or LOOPBACK  # ipc: all are here
        tensor_size, pipeline_size = stage.tensor_parallel_size, stage.pipeline_parallel_size
        group = meet(group_address, rank, tensor_size, pipeline_size, device, host=host)
        settings = loop_settings(deployment, stage_name)
        followers = None
        if rank == 0 and group.size > 1:
            followers = Followers(context, orders_address(group_address), group.size - 1, key)
            group.publish(ORDERS, followers.address)
        engine = load_engine(deployment, stage, device, group, on_layer=progress.beat)
        engine.runner.while_waiting = progress.waiting
        layout = pool_layout(engine, fingerprint(engine.spec, deployment.model))
        addresses = group.all_of("peer", peer_address)
        pool, transfer = engine.pool.tensor, deployment.transfer
        followed = FollowedLeases(wait_s=transfer.timeout_s / 2)  # a reader counts the link as broken after the whole
        leases = Leases() if followers is None else GroupLeases(followers)
        server = PeerServer(
            context,
            peer_address,
            engine.pool,
            layout,
            life=int(life),
            rank_addresses=addresses,
            key=key,
            leases=followed if rank else leases,
            timeout_s=transfer.timeout_s,
        )
        if rank:
            to_leader = connect_to_leader(context, group.look_up(ORDERS), rank, key)
            peers = Peers(context, pool, layout, transfer, rank=rank, key=key)
            follower = Follower(rank, engine, settings.host_kv_bytes, peers, server, followed, to_leader, progress)
        else:
            if followers is None:
                peers = Peers(context, pool, layout, transfer, key=key)
            else:
                peers = GroupPeers(context, pool, layout, transfer, followers, key)
            loop = EngineLoop(engine, peers, settings, peer_address, followers, life=int(life), leases=leases)
    except ConfigError as error:
        socket.send_multipart([b"failed", life.encode(), str(error).encode()])
        socket.close(linger=LAST_WORD_MS)
        to_stage.term()  # returns when the message is out
        os._exit(1)  # other ranks, or readers of the pool, may keep what is here from being torn down
    max_model_len = deployment.model.limit_model_len(engine.spec.max_model_len)
    timed = time_steps(engine, deployment.prefill.max_num_batched_tokens, stage.max_num_seqs, max_model_len)
    settle_interpreter()
    if rank:
        follower.start()
        while True:
            follower.serve_once()
    loop.estimator.learn(timed)
    if followers is not None:
        followers.wait_until_ready(LOAD_TIMEOUT_S)
    up = ReplicaUp(
        replica=int(replica),
        life=int(life),
        device=devices,
        num_blocks=engine.pool.num_blocks,
        num_host_blocks=loop.num_host_blocks,
        num_places=deployment.num_places(stage_name),
        pid=os.getpid(),
        peer_address=peer_address,
        timed=timed,
    )
    Worker(loop, socket, server, progress, up).serve()


@dataclass(slots=True)
class Worker:
    """Between the loop and its sockets."""

    loop: EngineLoop
    socket: "zmq.Socket[bytes]"
    server: PeerServer
    progress: Progress
    up: ReplicaUp  # of the present life

    def serve(self) -> None:
        self._send(b"up", encode(self.up))
        while True:
            self.serve_once()

    def serve_once(self) -> None:
        """What has come, then a step."""
        loop = self.loop
        if not loop.has_work:
            zmq.select([self.socket, self.server.socket, *loop.peers.attaching], [], [], IDLE_POLL_MS / 1e3)
        self._send_events(loop.end_leases(self.server.acknowledged()))
        while self.socket.poll(0):
            self._receive(*self.socket.recv_multipart())
        if loop.peers.attaching:
            self._send_events(loop.receive_handles())
        if loop.waits_for_gpu:  # for ever, if it stands still
            time.sleep(GPU_POLL_S)
            return
        self.progress.beat()
        if loop.has_work:
            start = time.monotonic()
            events = loop.step()
            self.progress.step_takes(max(time.monotonic() - start, loop.launched_s))
            self._send_events(events)

    def _receive(self, kind: bytes, payload: bytes) -> None:
        if kind == b"command":
            self._send_events(self.loop.handle(decode_command(payload)))
        elif kind == b"reset":
            self._reset(int(payload))

    def _reset(self, life: int) -> None:
        """Another router: all requests end here, and nothing is said of them any more."""
        self.loop.cancel_all()
        while not self.loop.is_empty:
            self.progress.beat()
            self.loop.step()
        self.loop.peers.close()  # they begin new lives, too
        self.loop.begin_life(life)
        self.server.life = life
        self.up = ReplicaUp(
            **{name: getattr(self.up, name) for name in ReplicaUp.__struct_fields__ if name != "life"}, life=life
        )
        self._send(b"up", encode(self.up))

    def _send_events(self, events: list[Event]) -> None:
        for event in events:
            self._send(b"event", encode(event))

    def _send(self, kind: bytes, payload: bytes) -> None:
        """Raises zmq.Again when the stage takes nothing for too long: it counts as hung, and the process ends."""
        self.socket.send_multipart([kind, str(self.up.life).encode(), payload], zmq.NOBLOCK)


def cpu_threads(deployment: Deployment) -> int:
    """An equal part of the cores for each worker that computes on the CPU."""
    devices = deployment.prefill.devices + deployment.decode.devices
    return max(1, len(os.sched_getaffinity(0)) // max(1, devices.count("cpu")))


def _exit_with_the_stage(alive_fd: int) -> None:
    while os.read(alive_fd, 1):
        pass
    os._exit(0)


def _exit_without_connection(monitor: "zmq.Socket[bytes]") -> None:
    """What was on its way is lost, so another connection would not do."""
    try:
        monitor.recv()
    except zmq.ContextTerminated:
        monitor.close(linger=0)
    else:
        tell_operator("a worker has lost the connection to its stage, and ends")
        os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # Nothing is torn down: after a fault of the GPU every call of CUDA fails, in destructors too, and the sooner
        # the process has ended, the sooner its requests are taken up elsewhere and the next life begins.
        log_exception()
        os._exit(1)
