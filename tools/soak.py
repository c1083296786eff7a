"""Keeps a server under mixed load for minutes, and checks that nothing is left over.

    python -m tools.soak --minutes 10 --output docs/results/soak.json

Clients send random prompts (the lengths heavy-tailed), one in ten goes away early, one in twenty sends bad input, and
every so often a worker is killed. Afterwards every block must be free, the processes and the names in /dev/shm those of
the start, and memory flat: the second half must not grow over the first.
"""

import os
import random
import signal
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tritonclient.grpc as grpc
import typer
from rich.console import Console

from ensemble.config import Deployment
from tools.gpu_smoke import make_tensors, write_model_dir
from tools.results import write_results
from tools.triton_server import TritonServer

TINY_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 384,
    "eos_token_id": 2,
}
MAX_GROWTH = 1.10  # of the resident memory of all processes, late over early
GRACE_S = 10.0  # for blocks to come back, and a killed worker


class Client(threading.Thread):
    """Sends one request after the other until told to stop, and counts what came of them."""

    def __init__(
        self, url: str, seed: int, outcomes: Counter[str], lock: threading.Lock, stop: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self._url, self._rng, self._outcomes, self._lock, self._stop_event = (
            url,
            random.Random(seed),
            outcomes,
            lock,
            stop,
        )

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
        inputs = {
            "input_ids": np.array([rng.randrange(384) for _ in range(prompt_len)], np.int32),
            "max_tokens": np.array([-1 if is_bad else max_tokens], np.int32),
            "temperature": np.array([rng.choice([0.0, 1.0])], np.float32),
            "ignore_eos": np.ones(1, bool),
            "stream": np.ones(1, bool),
            "return_num_output_tokens": np.ones(1, bool),
        }
        ended, errors, num_tokens = threading.Event(), [], 0

        def receive(result: Any, error: Exception | None) -> None:
            nonlocal num_tokens
            if error is not None:
                errors.append(str(error))
                ended.set()
                return
            if result.get_response().outputs:
                num_tokens += int(result.as_numpy("num_output_tokens")[0])
            if result.get_response().parameters["triton_final_response"].bool_param:
                ended.set()

        client = grpc.InferenceServerClient(self._url)
        try:
            client.start_stream(receive)
            client.async_stream_infer("scheduler", make_tensors(inputs), enable_empty_final_response=True)
            is_whole = ended.wait(rng.uniform(0.005, 0.1) if goes_away else 60.0)
            client.stop_stream(cancel_requests=not is_whole)
        finally:
            client.close()
        if not is_whole:
            return "went away" if goes_away else "HUNG"
        if is_bad:
            return "bad input refused" if errors and "max_tokens = -1" in errors[0] else "BAD INPUT ACCEPTED"
        if errors:
            return "unavailable" if "is unavailable" in errors[0] else f"ERROR {errors[0][:80]}"
        return "complete" if num_tokens == max_tokens else "INCOMPLETE"


def processes(server: TritonServer) -> list[psutil.Process]:
    return [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]


def workers(server: TritonServer) -> list[psutil.Process]:
    found = []
    for process in processes(server):
        try:
            if "ensemble.workers.worker" in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def resident_bytes(server: TritonServer) -> int:
    total = 0
    for process in processes(server):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def shared_memory(server: TritonServer) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"*{server.run_dir.name}*"))


def blocks_in_use(server: TritonServer) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        samples = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[:10] == "distserve:"]
    total = sum(float(value) for name, value in samples if name.startswith("distserve:kv_blocks{"))
    free = sum(float(value) for name, value in samples if name.startswith("distserve:kv_blocks_free{"))
    return total - free if total else -1.0


def settled(server: TritonServer, num_workers: int) -> bool:
    return blocks_in_use(server) == 0 and len(workers(server)) == num_workers


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
        threads = [Client(server.grpc_url, seed, outcomes, lock, stop) for seed in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(5)  # every thread pool has its size
        num_workers, before, names = len(workers(server)), len(processes(server)), shared_memory(server)
        memory: list[int] = []
        num_kills, start = 0, time.monotonic()
        while (elapsed := time.monotonic() - start) < minutes * 60:
            time.sleep(1)
            if kill_every_s and elapsed > (num_kills + 1) * kill_every_s:
                num_kills += 1
                os.kill(rng.choice(workers(server)).pid, signal.SIGKILL)
            memory.append(resident_bytes(server))
            if len(memory) % 15 == 0:
                console.print(f"{elapsed:5.0f} s  {memory[-1] >> 20} MiB  {num_kills} kills  {dict(outcomes)}")
        stop.set()
        for thread in threads:
            thread.join(timeout=90)
        deadline = time.monotonic() + GRACE_S
        while not settled(server, num_workers) and time.monotonic() < deadline:
            time.sleep(0.2)
        left_blocks, after, left_names = blocks_in_use(server), len(processes(server)), shared_memory(server)
    tenth = max(1, len(memory) // 10)
    early, late = sorted(memory[tenth : 5 * tenth]), sorted(memory[-4 * tenth :])
    growth = late[len(late) // 2] / early[len(early) // 2]
    faults = {name: count for name, count in outcomes.items() if name[:2].isupper()}
    rows: list[dict[str, Any]] = [
        {"name": "time under load", "value": minutes, "unit": "minutes"},
        {"name": "workers killed", "value": num_kills, "unit": "kills"},
        *({"name": f"requests: {name}", "value": count, "unit": "requests"} for name, count in outcomes.items()),
        {
            "name": "requests hung, wrong or with an unexpected error",
            "value": sum(faults.values()),
            "unit": "requests",
            "goal": 0,
            "met": not faults,
        },
        {
            "name": "blocks in use afterwards",
            "value": left_blocks,
            "unit": "blocks",
            "goal": 0,
            "met": left_blocks == 0,
        },
        {
            "name": "processes more than at the start",
            "value": after - before,
            "unit": "processes",
            "goal": 0,
            "met": after == before,
        },
        {
            "name": "names in /dev/shm more than at the start",
            "value": len(left_names) - len(names),
            "unit": "names",
            "goal": 0,
            "met": left_names == names,
        },
        {
            "name": "resident memory, late over early",
            "value": round(growth, 3),
            "unit": "",
            "goal": MAX_GROWTH,
            "met": growth <= MAX_GROWTH,
        },
    ]
    for row in rows:
        console.print(f"{row['name']:55} {row['value']} {row['unit']}", highlight=False)
    if output is not None:
        write_results(output, rows)
    if not all(row.get("met", True) for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
