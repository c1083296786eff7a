"""Kills, stops and pauses every stub of a served model under load, on the CPU.

    python -m tools.proofs.stub_deaths --output docs/results/stub-deaths.json

Clients of `scheduler` over gRPC and of `ensemble` over HTTP send long requests, one after the other. For each stub the
tool sends SIGKILL, or SIGSTOP, and measures until the last request that was under way has ended, and until one of each
model that was sent afterwards has been served. Both times are from the signal on. On a third server each stub, and then
the Triton server with all that it has started, stands still for STALL_S and goes on, which is to harm no request.
4 minutes.
"""

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, get_args

import numpy as np
import psutil
import typer

from tools.benchmarks.results import at_most, exactly, report
from tools.proofs.gpu_smoke import write_model_dir
from tools.proofs.grpc_request import Answer, Inputs, ModelName, ask
from tools.proofs.http_request import ask_http
from tools.proofs.serve_process import ServeProcess, wait_until
from tools.server.tiny_server import TINY_MODEL

STUBS = ("scheduler", "prefill", "decode", "preprocess", "answer")
KNOWN_GOAL_S, SERVED_GOAL_S = 3.0, 20.0
REQUEST_TIMEOUT_S = 60.0
MAX_TOKENS = 400
STALL_S = 1.5  # longer than the Triton server by itself waits for a stub; shorter than the watch's two seconds
PAUSE_S = 0.1  # of a client that was refused


@dataclass(frozen=True, slots=True)
class Outcome:
    model: ModelName
    sent_at: float  # time.monotonic(), as all times here
    ended_at: float
    has_ended: bool
    error: str | None


class Load:
    """Two clients of each model, from entry to exit."""

    def __init__(self, server: ServeProcess) -> None:
        self.outcomes: list[Outcome] = []  # appended by the clients' threads
        self._under_way: dict[int, float] = {}
        self._stop = threading.Event()
        fronts = 2 * [(ask, server.grpc_url, "scheduler"), (ask_http, server.http_url, "ensemble")]
        self._threads = [threading.Thread(target=self._run, args=(i, *front)) for i, front in enumerate(fronts)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def is_full(self) -> bool:
        return len(self._under_way) == len(self._threads)

    def served_at(self, moment: float) -> float:
        """When each model has served a request that was sent after the moment; infinite: not yet."""
        served = [each for each in self.outcomes.copy() if each.error is None and each.sent_at > moment]
        return max(
            min((each.ended_at for each in served if each.model == model), default=math.inf)
            for model in get_args(ModelName)
        )

    def _run(
        self, index: int, send: Callable[[str, Inputs, float, ModelName], Answer], url: str, model: ModelName
    ) -> None:
        ids, text = np.array([5, 6, 7 + index], np.int32), np.array([f"Once upon {index}"], np.object_)
        inputs: Inputs = {
            **({"text_input": text} if model == "ensemble" else {"input_ids": ids}),
            "max_tokens": np.array([MAX_TOKENS], np.int32),
            "temperature": np.zeros(1, np.float32),
            "ignore_eos": np.ones(1, bool),
            "stream": np.ones(1, bool),
        }
        while not self._stop.is_set():
            self._under_way[index] = sent_at = time.monotonic()
            answer = send(url, inputs, REQUEST_TIMEOUT_S, model)
            del self._under_way[index]
            self.outcomes.append(Outcome(model, sent_at, answer.ended_at, answer.has_ended, answer.error))
            if answer.error is not None:
                self._stop.wait(PAUSE_S)


def harm(server: ServeProcess, load: Load, stub: str, number: signal.Signals) -> list[dict[str, Any]]:
    """One signal to one stub, and the rows of what came of it."""
    wait_until(load.is_full, REQUEST_TIMEOUT_S)
    harmed_at = time.monotonic()
    os.kill(server.stub(stub), number)
    wait_until(lambda: load.served_at(harmed_at) < math.inf, REQUEST_TIMEOUT_S)
    served_s = load.served_at(harmed_at) - harmed_at
    lost = [each for each in load.outcomes.copy() if each.sent_at <= harmed_at < each.ended_at]
    server.wait_ready(REQUEST_TIMEOUT_S)
    known_s = max((each.ended_at - harmed_at for each in lost), default=0.0)
    name = f"{number.name} of {stub}"
    return [
        at_most(f"{name}: until the last client knows", round(known_s, 2), "s", KNOWN_GOAL_S),
        at_most(f"{name}: until both models serve", round(served_s, 2), "s", SERVED_GOAL_S),
    ]


def stall(server: ServeProcess, load: Load, name: str, pids: list[int]) -> dict[str, Any]:
    """These processes stand still for a moment; the row of what came of it."""
    wait_until(load.is_full, REQUEST_TIMEOUT_S)
    num_before = len(load.outcomes)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STALL_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    went_on_at = time.monotonic()
    wait_until(lambda: load.served_at(went_on_at) < math.inf, REQUEST_TIMEOUT_S)
    num_failed = sum(each.error is not None for each in load.outcomes[num_before:])
    return exactly(f"{name} stood still for {STALL_S} s: requests that failed", num_failed, "requests", 0)


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None) -> None:
    """Exit status 1 if a goal was missed."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as name:
        model = Path(name) / "model"
        write_model_dir(model, TINY_MODEL)
        flags = ("--load-format", "dummy", "--dtype", "float32", "--kv-cache-bytes", str(64 << 20))
        hung = 0
        for number in (signal.SIGKILL, signal.SIGSTOP):  # a server each: it is started again five times at most
            folder = Path(name) / number.name
            folder.mkdir()
            server = ServeProcess(model, folder, *flags)
            try:
                with Load(server) as load:
                    for stub in STUBS:
                        rows += harm(server, load, stub, number)
                hung += sum(not each.has_ended for each in load.outcomes)
            finally:
                server.close()
        folder = Path(name) / "stalls"
        folder.mkdir()
        server = ServeProcess(model, folder, *flags)
        try:
            with Load(server) as load:
                pids = {stub: server.stub(stub) for stub in STUBS}
                triton_server = psutil.Process(psutil.Process(pids["scheduler"]).ppid())
                family = [triton_server.pid, *(child.pid for child in triton_server.children(recursive=True))]
                for who, stalled in [*((stub, [pid]) for stub, pid in pids.items()), ("all of it", family)]:
                    rows.append(stall(server, load, who, stalled))
            hung += sum(not each.has_ended for each in load.outcomes)
            rows.append(exactly("restarts for that", server.said().count("starting it again"), "restarts", 0))
        finally:
            server.close()
        rows.append(exactly("requests that hung", hung, "requests", 0))
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
