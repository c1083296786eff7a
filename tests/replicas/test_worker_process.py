"""The worker process by itself: however its engine fails, its end is seen at once; another router finds it empty."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.protocol.router_replica import (
    PromptChunk,
    ReplicaUp,
    RunPrompts,
    StepDone,
    decode_event,
    decode_from_stage,
    encode,
)
from ensemble.replicas.progress import Progress
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama

LIFE = 3


class Stage:
    """The process, and the stage's end of its socket."""

    def __init__(self, process: subprocess.Popen[str], socket: "zmq.Socket[bytes]") -> None:
        self.process = process
        self.socket = socket
        self.identity = b""

    def receive(self) -> tuple[bytes, int, bytes]:
        assert self.socket.poll(60_000)
        self.identity, kind, life, payload = self.socket.recv_multipart()
        return kind, int(life), payload

    def send(self, kind: bytes, payload: bytes) -> None:
        self.socket.send_multipart([self.identity, kind, payload])


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Of a decode replica; the test's parameter: more of its settings."""
    progress = Progress()
    stage = {"devices": ["cpu"], "kv_cache_bytes": 1 << 20}
    decode = {**stage, **getattr(request, "param", {})}
    model = {"path": make_tiny_llama(tmp_path / "model")}
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(Deployment.parse({"model": model, "prefill": stage, "decode": decode}).to_yaml())
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/stage")
    alive, stage_lives = os.pipe()
    addresses = [f"ipc://{tmp_path}/stage", f"ipc://{tmp_path}/peer"]
    arguments = ["decode", "0", str(LIFE), "0", "cpu", *addresses, "none", str(alive), str(progress.fd)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble.replicas.worker", *arguments],
        pass_fds=[alive, progress.fd],
        env={**os.environ, DEPLOYMENT_VARIABLE: str(deployment)},
        stderr=subprocess.PIPE,
        text=True,
    )
    yield Stage(process, socket)
    process.kill()
    process.communicate()
    os.close(alive)
    os.close(stage_lives)
    context.destroy(linger=0)


def test_a_fault_in_the_worker_s_loop_ends_the_process(stage: Stage) -> None:
    kind, life, payload = stage.receive()
    up = decode_from_stage(payload)
    assert (kind, life) == (b"up", LIFE) and isinstance(up, ReplicaUp) and up.life == LIFE
    assert up.pid == stage.process.pid
    stage.send(b"command", b"no command")
    _, errors = stage.process.communicate(timeout=20)
    assert stage.process.returncode == 1
    assert "msgspec" in errors


@pytest.mark.parametrize("stage", [{"policy": "mlfq", "host_kv_bytes": 1}], indirect=True)
def test_what_its_loop_cannot_have_is_said_and_the_process_ends(stage: Stage) -> None:
    """By itself, though its pool is served already."""
    kind, life, reason = stage.receive()
    assert (kind, life) == (b"failed", LIFE)
    assert reason.startswith(b"host_kv_bytes = 1: a block has ")
    stage.process.communicate(timeout=20)
    assert stage.process.returncode == 1


def test_after_a_reset_it_is_empty_and_lives_another_life(stage: Stage) -> None:
    stage.receive()
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    request = Request(request_id=1, prompt_token_ids=[5] * 9, sampling=sampling)
    stays = PromptChunk(request_id=1, end=9, request=request, stays=True)
    begun = PromptChunk(request_id=2, end=4, request=Request(request_id=2, prompt_token_ids=[5] * 9, sampling=sampling))
    stage.send(b"command", encode(RunPrompts(batch_id=0, chunks=[begun])))
    while (event := decode_event(stage.receive()[2])) and not (isinstance(event, StepDone) and event.batch_ids == [0]):
        pass
    stage.send(b"reset", str(LIFE + 1).encode())
    kind, life, payload = stage.receive()
    while kind != b"up":
        kind, life, payload = stage.receive()
    up = decode_from_stage(payload)
    assert life == LIFE + 1 and isinstance(up, ReplicaUp) and up.life == LIFE + 1
    stage.send(b"command", encode(RunPrompts(batch_id=0, chunks=[stays])))
    token_ids: list[int] = []
    while len(token_ids) < 5:
        kind, life, payload = stage.receive()
        assert (kind, life) == (b"event", LIFE + 1)
        event = decode_event(payload)
        if isinstance(event, StepDone):
            assert set(event.request_ids) <= {1}
            token_ids += event.token_ids
    assert event.num_free_blocks <= up.num_blocks
    kind, life, payload = stage.receive()
    assert decode_event(payload).num_free_blocks == up.num_blocks  # type: ignore[union-attr]
