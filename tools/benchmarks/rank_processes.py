"""A replica's processes as a stage starts and commands them, for what their steps take as the stage sees it."""

import select
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

import zmq

from ensemble.config import Deployment
from ensemble.protocol.router_replica import PromptChunk, RunPrompts, StepDone, decode_event, encode
from ensemble.replicas.launchers.base import WORKER, ReplicaStart
from ensemble.replicas.launchers.local import LocalLauncher
from ensemble.request import Request, SamplingParams

ANSWER_TIMEOUT_S = 60.0
_LEADER = b"0:0"  # replica 0, life 0


@dataclass(frozen=True, slots=True)
class SeenStep:
    at: float  # time.monotonic() when the stage was told of it
    done: StepDone

    @property
    def num_prompt_tokens(self) -> int:
        return self.done.timed.shape.num_prompt_tokens if self.done.timed is not None else 0

    @property
    def num_rows(self) -> int:
        """Sequences that decoded."""
        return self.done.timed.shape.num_rows if self.done.timed is not None else 0

    @property
    def seconds(self) -> float:
        """As the replica has measured it."""
        return self.done.timed.seconds if self.done.timed is not None else 0.0


class RankProcesses:
    """Replica 0 of `decode`. The environment names the deployment's file. Raises RuntimeError where a rank fails."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._launcher = LocalLauncher(run_dir, [sys.executable, *WORKER])
        address = self._launcher.bind(self._socket)
        devices = tuple(deployment.decode.devices)
        start = ReplicaStart(home="decode", replica=0, life=0, devices=devices, stage_address=address)
        self._processes = self._launcher.start(start)
        self._request_ids = count()
        self._batch_ids = count()

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._launcher.close(timeout_s=5.0)
        self._socket.close(linger=0)

    def wait_until_up(self, timeout_s: float) -> None:
        while self._receive(timeout_s)[0] != b"up":
            pass

    def run(self, prompts: list[list[int]], max_tokens: int) -> list[SeenStep]:
        """Every step until each prompt has had so many tokens, all sent at once."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        requests = [
            Request(request_id=next(self._request_ids), prompt_token_ids=prompt, sampling=sampling)
            for prompt in prompts
        ]
        chunks = [
            PromptChunk(request_id=each.request_id, end=each.prefill_len, request=each, stays=True) for each in requests
        ]
        command = encode(RunPrompts(batch_id=next(self._batch_ids), chunks=chunks))
        self._socket.send_multipart([_LEADER, b"command", command])
        running, steps = {each.request_id for each in requests}, []
        while running:
            _, payload = self._receive(ANSWER_TIMEOUT_S)
            at, event = time.monotonic(), decode_event(payload)
            if isinstance(event, StepDone):
                steps.append(SeenStep(at, event))
                running.difference_update(event.finished)
        return steps

    def _receive(self, timeout_s: float) -> tuple[bytes, bytes]:
        """Kind, payload. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with suppress(zmq.Again):
                _, kind, _, payload = self._socket.recv_multipart(zmq.NOBLOCK)
                if kind == b"failed":
                    raise RuntimeError(payload.decode())
                return kind, payload
            if self._processes.is_collected:
                raise RuntimeError("the replica has ended")
            if select.select([self._processes.exit_fd], [], [], 0)[0]:
                raise RuntimeError(self._processes.collect())
            self._socket.poll(100)
        raise TimeoutError(f"{self._processes.name} has said nothing for {timeout_s:.0f} s")
