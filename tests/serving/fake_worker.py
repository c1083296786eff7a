"""A worker process that speaks with its stage and computes nothing; called as ensemble.replicas.worker is.

A command is a string: most come back as events, some are obeyed. The device says how it starts.
"""

import os
import sys
import threading
import time

import msgspec
import zmq

from ensemble.protocol.curve import CurveKey, connect
from ensemble.protocol.router_replica import ReplicaUp, encode
from ensemble.replicas.progress import Progress


def main() -> None:
    _, replica, life, _, device, stage_address, peer_address, _, alive_fd, progress_fd = sys.argv[1:]
    threading.Thread(target=lambda: (os.read(int(alive_fd), 1), os._exit(0)), daemon=True).start()
    stage = zmq.Context().socket(zmq.DEALER)
    stage.identity = f"{replica}:{life}".encode()
    stage.rcvhwm = 1
    connect(stage, stage_address, CurveKey.from_environment())
    if device == "cuda:7":
        stage.send_multipart([b"failed", life.encode(), b"cuda:7: this machine has none"])
    if device == "cuda:8":
        os._exit(3)
    progress = Progress(int(progress_fd))

    def come_up() -> None:
        up = ReplicaUp(
            replica=int(replica),
            life=int(life),
            device=device,
            num_blocks=10,
            num_host_blocks=0,
            num_places=4,
            pid=os.getpid(),
            peer_address=peer_address,
        )
        stage.send_multipart([b"up", life.encode(), encode(up)])

    def tell(payload: bytes) -> None:
        stage.send_multipart([b"event", life.encode(), payload])

    if device != "cuda:7":
        come_up()
    while True:
        progress.beat()
        if not stage.poll(100):
            continue
        kind, payload = stage.recv_multipart()
        if kind == b"reset":
            tell(encode("the last words of a life"))
            life = payload.decode()
            come_up()
            continue
        command = msgspec.msgpack.decode(payload)
        if command == "come up again":
            come_up()
        elif command == "exit":
            os._exit(3)
        elif command == "tell nonsense":
            tell(b"\xc1")
        elif command == "speak for the last life":
            stage.send_multipart([b"event", b"%d" % (int(life) - 1), encode("stale")])
        elif command == "take no more commands":
            while True:
                progress.beat()
                time.sleep(0.1)
        tell(encode(command))


main()
