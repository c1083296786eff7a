"""The worker process: loads one replica's engine, then serves its stage over ZeroMQ until the stage goes away.

    python -m ensemble.workers.worker STAGE REPLICA EPOCH STAGE_ADDRESS PEER_ADDRESS ALIVE_FD

The deployment file is named by the environment. ALIVE_FD is a pipe that the stage holds open: its end means that the
stage is gone, whichever way it went, and the worker must not outlive it.
"""

import os
import signal
import sys
import threading
import time
import traceback

import torch
import zmq

from ensemble.config import DecodeConfig, Deployment
from ensemble.engine.engine import load_engine
from ensemble.engine.model_runner import Role
from ensemble.errors import ConfigError
from ensemble.workers.decode_worker import DecodeWorker
from ensemble.workers.messages import LoadFailed, ReplicaUp, WorkerEvent, decode_command, encode
from ensemble.workers.peers import Peers, PeerServer
from ensemble.workers.prefill_worker import PrefillWorker

GPU_POLL_S = 1e-4  # a millisecond, the shortest wait of a ZeroMQ poll, would be a tenth of a short prompt's TTFT


def main() -> None:
    stage_name, replica, epoch, stage_address, peer_address, alive_fd = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    threading.Thread(target=_exit_with_the_stage, args=(int(alive_fd),), daemon=True).start()

    context = zmq.Context()
    stage_socket = context.socket(zmq.DEALER)
    stage_socket.identity = f"{replica}:{epoch}".encode()
    stage_socket.connect(stage_address)
    deployment = Deployment.from_environment()
    stage = deployment.prefill if stage_name == "prefill" else deployment.decode
    device = torch.device(stage.devices[int(replica)])
    if device.type == "cpu":
        torch.set_num_threads(stage.num_threads or cpu_threads(deployment))
    try:
        role: Role = "mixed" if deployment.local_prefill_tokens else "decode"
        engine = load_engine(deployment, stage, device, "prefill" if stage_name == "prefill" else role)
        worker: PrefillWorker | DecodeWorker
        if stage_name == "prefill":
            worker = PrefillWorker(engine, peer_address, deployment.prefill.prefix_cache)
        else:
            worker = DecodeWorker(engine, Peers(context, device), deployment.decode, deployment.local_prefill_tokens)
    except ConfigError as error:
        stage_socket.send(encode(LoadFailed(reason=str(error))))
        stage_socket.close()
        context.term()  # returns when the message is out
        sys.exit(1)
    up = ReplicaUp(
        replica=int(replica),
        epoch=int(epoch),
        num_blocks=engine.pool.num_blocks,
        num_host_blocks=worker.num_host_blocks if isinstance(worker, DecodeWorker) else 0,
        max_num_seqs=stage.num_places if isinstance(stage, DecodeConfig) else stage.max_num_seqs,
        pid=os.getpid(),
        peer_address=peer_address,
    )
    if isinstance(worker, PrefillWorker):
        server = PeerServer(context, peer_address, engine.pool)
        stage_socket.send(encode(up))
        serve_prefill(worker, stage_socket, server)
    else:
        stage_socket.send(encode(up))
        serve_decode(worker, stage_socket)


def serve_prefill(worker: PrefillWorker, stage: zmq.Socket[bytes], server: PeerServer) -> None:
    poller = zmq.Poller()
    poller.register(stage, zmq.POLLIN)
    poller.register(server.socket, zmq.POLLIN)
    while True:
        poller.poll(0 if worker.has_work else None)
        _send(stage, worker.end_leases(server.acknowledged()))
        _handle_commands(worker, stage)
        if worker.waits_for_gpu:
            time.sleep(GPU_POLL_S)
        elif worker.has_work:
            _send(stage, worker.step())


def serve_decode(worker: DecodeWorker, stage: zmq.Socket[bytes]) -> None:
    while True:
        if not worker.has_work:
            zmq.select([stage, *worker.peers.attaching], [], [])
        _handle_commands(worker, stage)
        if worker.peers.receive_handles():
            worker.start_pulls()
        if worker.has_work:
            _send(stage, worker.step())


def cpu_threads(deployment: Deployment) -> int:
    """An equal part of the cores for each worker that computes on the CPU."""
    devices = deployment.prefill.devices + deployment.decode.devices
    return max(1, len(os.sched_getaffinity(0)) // devices.count("cpu"))


def _handle_commands(worker: PrefillWorker | DecodeWorker, stage: zmq.Socket[bytes]) -> None:
    while stage.poll(0):
        _send(stage, worker.handle(decode_command(stage.recv())))


def _send(stage: zmq.Socket[bytes], events: list[WorkerEvent]) -> None:
    for event in events:
        stage.send(encode(event))


def _exit_with_the_stage(alive_fd: int) -> None:
    while os.read(alive_fd, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # Nothing is torn down: after a fault of the GPU every call of CUDA fails, in destructors too, and the sooner
        # the process has ended, the sooner its requests get their error and the next life begins.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
