"""The worker process by itself: however its engine fails, its end is seen at once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.workers.messages import AttachPeer, ReplicaUp, decode_worker_event, encode
from tests.checkpoints import make_tiny_llama


@pytest.fixture
def prefill_worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], zmq.Socket[bytes]]]:
    """The process, and the stage's end of its socket."""
    stage = {"devices": ["cpu"], "kv_cache_bytes": 1 << 20}
    model = {"path": make_tiny_llama(tmp_path / "model")}
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(Deployment.parse({"model": model, "prefill": stage, "decode": stage}).to_yaml())
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/stage")
    alive, stage_lives = os.pipe()
    arguments = ["prefill", "0", "0", f"ipc://{tmp_path}/stage", f"ipc://{tmp_path}/peer", str(alive)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble.replicas.worker", *arguments],
        pass_fds=[alive],
        env={**os.environ, DEPLOYMENT_VARIABLE: str(deployment)},
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, socket
    process.kill()
    process.communicate()
    os.close(alive)
    os.close(stage_lives)
    context.destroy(linger=0)


def test_a_fault_in_the_engine_s_loop_ends_the_process(
    prefill_worker: tuple[subprocess.Popen[str], zmq.Socket[bytes]],
) -> None:
    process, socket = prefill_worker
    assert socket.poll(60_000)
    identity, payload = socket.recv_multipart()
    assert isinstance(decode_worker_event(payload), ReplicaUp)
    socket.send_multipart([identity, encode(AttachPeer(replica=0, address="ipc:///nowhere"))])  # decode's to do
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 1
    assert "a prefill worker was sent AttachPeer" in errors
