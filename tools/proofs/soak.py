"""Keeps a server under mixed load for minutes, and checks that nothing is left over.

    python -m tools.proofs.soak --minutes 10 --output docs/results/soak.json

Clients send random prompts (the lengths heavy-tailed), one in ten goes away early, one in twenty sends bad input, and
every so often a worker is killed. Requests must go on being answered. Afterwards every block must be free, the
processes and the names in /dev/shm those of the start, and memory, whenever all processes are there, flat.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ensemble.config import Deployment
from tools.benchmarks.results import at_most, exactly, report
from tools.proofs.gpu_smoke import write_model_dir
from tools.proofs.grpc_request import ask
from tools.proofs.http_request import ask_http
from tools.server.server_state import Metrics, processes, resident_bytes, shared_memory, workers
from tools.server.tiny_server import TINY_MODEL
from tools.server.triton_server import TritonServer

MAX_GROWTH = 1.10  # of the resident memory of all processes, late over early
REQUEST_TIMEOUT_S = 60.0
MAX_SILENCE_S = 15.0  # without any completed request: a worker is started again and loads
GRACE_S = 10.0  # for blocks to come back, and a killed worker


class Client(threading.Thread):
    """Sends one request after the other until told to stop, and counts what came of them."""

    def __init__(
        self, server: TritonServer, seed: int, outcomes: Counter[str], lock: threading.Lock, stop: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self._server, self._rng = server, random.Random(seed)
        self._outcomes, self._lock, self._stop_event = outcomes, lock, stop

    def run(self) -> None:
        while not self._stop_event.is_set():
            outcome = self._one_request()
            with self._lock:
                self._outcomes[outcome] += 1
            if outcome == "unavailable":
                self._stop_event.wait(0.2)

    def _one_request(self) -> str:
        rng = self._rng
        max_tokens = min(200, 1 + int(rng.expovariate(1 / 24)))
        prompt_len = min(300, 1 + int(rng.paretovariate(1.1) * 8))
        is_bad, goes_away = rng.random() < 0.05, rng.random() < 0.1
        over_http, stream = rng.random() < 0.5, rng.random() < 0.5
        inputs = {
            "input_ids": np.array([rng.randrange(384) for _ in range(prompt_len)], np.int32),
            "max_tokens": np.array([-1 if is_bad else max_tokens], np.int32),
            "temperature": np.array([rng.choice([0.0, 1.0])], np.float32),
            "ignore_eos": np.ones(1, bool),
            "stream": np.array([stream]),
            "return_num_output_tokens": np.ones(1, bool),
        }
        stay_s = rng.uniform(0.005, 0.1) if goes_away else REQUEST_TIMEOUT_S
        if over_http:
            answer = ask_http(self._server.http_url, inputs, stay_s)
        else:
            answer = ask(self._server.grpc_url, inputs, stay_s)
        num_tokens = sum(int(each["num_output_tokens"][0]) for each in answer.responses)
        if not answer.has_ended:
            return "went away" if goes_away else "HUNG"
        if is_bad:
            is_refused = answer.error is not None and "max_tokens = -1" in answer.error
            return "bad input refused" if is_refused else "BAD INPUT ACCEPTED"
        if answer.error is not None:
            return "unavailable" if "is unavailable" in answer.error else f"ERROR {answer.error[:80]}"
        return "complete" if num_tokens == max_tokens else "INCOMPLETE"


def settled(server: TritonServer, num_workers: int) -> bool:
    return Metrics(server).blocks_in_use == 0 and len(workers(server)) == num_workers


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    clients: int = 12,
    kill_every_s: Annotated[float, typer.Option(help="0: no kills")] = 20.0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None,
    log: Annotated[Path, typer.Option(help="the server's log")] = Path("/tmp/distserve-soak.log"),
) -> None:
    """Exit status 1 if anything was left over, hung or wrong."""
    console = Console()
    model = log.parent / f"soak-model-{os.getpid()}"
    write_model_dir(model, TINY_MODEL)
    stage = {"devices": ["cpu"], "kv_cache_bytes": 16 << 20, "num_threads": 1}
    deployment = Deployment.parse({"model": {"path": model, "load_format": "dummy"}, "prefill": stage, "decode": stage})
    outcomes: Counter[str] = Counter()
    stop, lock, rng = threading.Event(), threading.Lock(), random.Random(0)
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=120)
        threads = [Client(server, seed, outcomes, lock, stop) for seed in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(5)  # every thread pool has its size
        num_workers, before, names = len(workers(server)), len(processes(server)), shared_memory(server)
        memory: list[int] = []
        num_kills, start = 0, time.monotonic()
        num_complete, completed_at, silence_s = 0, start, 0.0
        while (elapsed := time.monotonic() - start) < minutes * 60:
            time.sleep(1)
            if kill_every_s and elapsed > (num_kills + 1) * kill_every_s:
                num_kills += 1
                os.kill(rng.choice(workers(server)).pid, signal.SIGKILL)
            if outcomes["complete"] > num_complete:
                num_complete, completed_at = outcomes["complete"], time.monotonic()
            silence_s = max(silence_s, time.monotonic() - completed_at)
            if len(processes(server)) == before:
                memory.append(resident_bytes(server))
            if elapsed // 15 > (elapsed - 1) // 15:
                console.print(
                    f"{elapsed:5.0f} s  {resident_bytes(server) >> 20} MiB  {num_kills} kills  {dict(outcomes)}"
                )
        stop.set()
        for thread in threads:
            thread.join(timeout=90)
        deadline = time.monotonic() + GRACE_S
        while not settled(server, num_workers) and time.monotonic() < deadline:
            time.sleep(0.2)
        left_blocks, after, left_names = Metrics(server).blocks_in_use, len(processes(server)), shared_memory(server)
    tenth = max(1, len(memory) // 10)
    early, late = sorted(memory[tenth : 5 * tenth]), sorted(memory[-4 * tenth :])
    growth = late[len(late) // 2] / early[len(early) // 2]
    faults = {name: count for name, count in outcomes.items() if name[:2].isupper()}
    rows: list[dict[str, Any]] = [
        {"name": "time under load", "value": minutes, "unit": "minutes"},
        {"name": "workers killed", "value": num_kills, "unit": "kills"},
        *({"name": f"requests: {name}", "value": count, "unit": "requests"} for name, count in outcomes.items()),
        exactly("requests hung, wrong or with an unexpected error", sum(faults.values()), "requests", 0),
        at_most("longest time without a completed request", round(silence_s, 1), "s", MAX_SILENCE_S),
        exactly("blocks in use afterwards", left_blocks, "blocks", 0),
        exactly("processes more than at the start", after - before, "processes", 0),
        exactly("names in /dev/shm that are not those of the start", len(set(left_names) ^ set(names)), "names", 0),
        at_most("resident memory, late over early", round(growth, 3), "", MAX_GROWTH),
    ]
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
