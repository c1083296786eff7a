"""The processes of a replica of two places, as a launcher starts them: they serve as one, and end as one."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.engine.engine import load_engine
from ensemble.protocol.router_replica import (
    PromptChunk,
    ReplicaUp,
    RunPrompts,
    StepDone,
    decode_event,
    decode_from_stage,
    encode,
)
from ensemble.replicas.launchers.base import WORKER, ReplicaStart
from ensemble.replicas.launchers.local import LocalLauncher, LocalRanks
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import CPU
from tools.offline import generate

WAIT_MS = 60_000


class Ranks:
    """The processes, and the stage's end of their leader's socket."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        context = zmq.Context.instance()
        self.socket = context.socket(zmq.ROUTER)
        self.launcher = LocalLauncher(run_dir, [sys.executable, *WORKER])
        self.deployment = deployment
        self.address = self.launcher.bind(self.socket)

    def start(self, devices: str) -> LocalRanks:
        """Life 0 of replica 0."""
        start = ReplicaStart(
            home="decode", replica=0, life=0, devices=tuple(devices.split(",")), stage_address=self.address
        )
        return self.launcher.start(start)

    def receive(self) -> tuple[bytes, bytes, int, bytes]:
        """identity, kind, life, payload"""
        assert self.socket.poll(WAIT_MS)
        identity, kind, life, payload = self.socket.recv_multipart()
        return identity, kind, int(life), payload

    def receive_up(self) -> ReplicaUp:
        kind, payload = b"", b""
        while kind != b"up":
            _, kind, _, payload = self.receive()
        up = decode_from_stage(payload)
        assert isinstance(up, ReplicaUp)
        return up

    def send(self, kind: bytes, payload: bytes) -> None:
        self.socket.send_multipart([b"0:0", kind, payload])

    def close(self) -> None:
        self.launcher.close(timeout_s=5.0)
        self.socket.close(linger=0)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    model = {"path": make_tiny_llama(tmp_path / "model"), "dtype": "float64"}
    stage = {"kv_cache_bytes": 1 << 20, "num_threads": 1, "max_num_seqs": 8}
    decode = stage | {"devices": ["cpu", "cpu"], "pp": 2}
    raw = {"model": model, "prefill": stage | {"devices": ["cpu"]}, "decode": decode, "hang_timeout_s": 2.0}
    deployment = Deployment.parse(raw)
    file = tmp_path / "deployment.yaml"
    file.write_text(deployment.to_yaml())
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    ranks = Ranks(deployment, tmp_path)
    yield ranks
    ranks.close()


def test_they_serve_as_one_through_a_reset_and_end_as_one(ranks: Ranks) -> None:
    sampling = SamplingParams(max_tokens=7, ignore_eos=True, seed=3, num_logprobs=1)
    requests = [Request(request_id=i, prompt_token_ids=[5 + i] * 9, sampling=sampling) for i in range(3)]
    done = generate(load_engine(ranks.deployment, ranks.deployment.prefill, CPU), requests)
    processes = ranks.start("cpu,cpu")
    up = ranks.receive_up()
    assert (up.device, up.pid) == ("cpu,cpu", processes.ranks[0].process.pid)
    for life in (0, 1):
        if life:
            ranks.send(b"reset", b"1")
            assert ranks.receive_up().life == 1
        chunks = [PromptChunk(request_id=each.request_id, end=9, request=each, stays=True) for each in requests]
        ranks.send(b"command", encode(RunPrompts(batch_id=0, chunks=chunks)))
        tokens: dict[int, list[int]] = {each.request_id: [] for each in requests}
        while min(map(len, tokens.values())) < 7:
            identity, kind, of_life, payload = ranks.receive()
            assert (identity, kind, of_life) == (b"0:0", b"event", life)
            event = decode_event(payload)
            if isinstance(event, StepDone):
                assert set(event.log_probs) == set(event.request_ids)
                for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                    tokens[request_id].append(token_id)
        assert tokens == {request_id: sequence.output_token_ids for request_id, sequence in done.items()}
    struck = processes.ranks[1].process.pid
    os.kill(struck, signal.SIGKILL)
    assert select.select([processes.exit_fd], [], [], 5)[0]
    assert processes.collect() == f"worker process {struck} ended (killed by signal 9)"
    assert all(rank.process.returncode is not None for rank in processes.ranks)


def test_a_replica_with_devices_of_another_number_cannot_start(ranks: Ranks) -> None:
    processes = ranks.start("cpu")
    _, kind, _, payload = ranks.receive()
    assert (kind, payload) == (b"failed", b"devices = cpu: a replica of decode has 2 ranks")
    processes.kill()
