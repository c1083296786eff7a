"""Keeps a server under mixed load for minutes and loses its workers: no client may notice, and nothing be left over.

    python -m tools.proofs.soak --minutes 10 --output docs/results/soak.json

Clients send requests whose answers are known, greedy and seeded, through `ensemble` and `scheduler`, over gRPC and
HTTP; one in ten goes away early, one in twenty sends bad input, and every so often a worker is killed, or stopped. In
float64 every answer must be what its request gave alone, and no stream be silent for long. Afterwards every block must
be free, the processes and the names in /dev/shm those of the start, and memory, whenever all processes are there, flat.
"""

import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ensemble.config import Deployment
from tools.benchmarks.results import at_least, at_most, exactly, report
from tools.proofs.faults import Fault, Shape, list_fleet, silence_rows, strike, verdict_rows
from tools.proofs.known_requests import (
    REQUEST_TIMEOUT_S,
    Known,
    Load,
    Outcome,
    alone,
    any_model,
    judge,
    make_inputs,
    send,
)
from tools.proofs.soak_swaps import VOCAB_SIZE, write_model
from tools.server.server_state import Metrics, processes, resident_bytes, shared_memory, workers
from tools.server.triton_server import TritonServer

MAX_GROWTH = 1.10  # of the resident memory of all processes, late over early
NUM_KNOWN = 60
CANCELLED_SHARE, BAD_SHARE = 0.1, 0.05
GRACE_S = 15.0  # for blocks to come back, and a killed worker


def send_one(server: TritonServer, known: list[Known], rng: random.Random) -> Outcome:
    asked = rng.choice(known)
    is_bad, goes_away = rng.random() < BAD_SHARE, rng.random() < CANCELLED_SHARE
    inputs = asked.inputs | ({"max_tokens": np.array([-1], np.int32)} if is_bad else {})
    stay_s = rng.uniform(0.005, 0.5) if goes_away else REQUEST_TIMEOUT_S
    answer = send(server, inputs, any_model(rng, asked), rng.random() < 0.5, stay_s)
    return judge(asked, answer, goes_away=goes_away, is_bad=is_bad)


def settled(server: TritonServer, num_workers: int) -> bool:
    return Metrics(server).blocks_in_use == 0 and len(workers(server)) == num_workers


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    fleet: Annotated[str, typer.Option(help="such as 1P1D, 2P1D1M, 2M")] = "1P1D",
    clients: int = 12,
    fault_every_s: Annotated[float, typer.Option(help="a kill or a SIGSTOP by turns; 0: none")] = 20.0,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None,
    log: Annotated[Path, typer.Option(help="the server's log")] = Path("/tmp/distserve-soak.log"),
) -> None:
    """Exit status 1 if a request failed, was wrong or hung, a stream was silent for too long, or anything is left."""
    console, rng, shape = Console(width=150, highlight=False), random.Random(seed), Shape.parse(fleet)
    faults: list[Fault] = []
    fields = shape.fields(["cpu"])
    for home in ("prefill", "decode"):
        fields[home] |= {"kv_cache_bytes": 16 << 20, "num_threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        deployment = Deployment.parse({"model": {"path": model, "dtype": "float64"}} | fields)
        with TritonServer(deployment, log_path=log) as server:
            server.wait_ready(timeout_s=120)
            shape.assign_roles(server)
            known = [alone(server, make_inputs(rng, VOCAB_SIZE)) for _ in range(NUM_KNOWN)]
            with Load(lambda rng: send_one(server, known, rng), clients) as load:
                time.sleep(5)  # every thread pool has its size
                num_workers, before, names = len(workers(server)), len(processes(server)), shared_memory(server)
                memory: list[int] = []
                start, told_at = time.monotonic(), 0.0
                while (elapsed := time.monotonic() - start) < minutes * 60:
                    time.sleep(1)
                    if fault_every_s and elapsed > (len(faults) + 1) * fault_every_s:
                        up = [row for row in list_fleet(server) if row.state == "up"]
                        faults.append(strike(server, [rng.choice(up)], is_stop=len(faults) % 2 == 1, load_s=0.0))
                    if len(processes(server)) == before:
                        memory.append(resident_bytes(server))
                    if elapsed - told_at > 30:
                        told_at = elapsed
                        sizes = f"{resident_bytes(server) >> 20} MiB"
                        console.print(f"{elapsed:5.0f} s  {sizes}  {len(faults)} faults  {dict(load.verdicts())}")
            deadline = time.monotonic() + GRACE_S
            while not settled(server, num_workers) and time.monotonic() < deadline:
                time.sleep(0.2)
            metrics, after, left_names = Metrics(server), len(processes(server)), shared_memory(server)
            run_dir = server.run_dir
        left_dirs = int(run_dir.exists())
    tenth = max(1, len(memory) // 10)
    early, late = sorted(memory[tenth : 5 * tenth]), sorted(memory[-4 * tenth :])
    growth = late[len(late) // 2] / early[len(early) // 2] if early else float("inf")
    took_s = max(each.ended_at - each.sent_at for each in load.outcomes)
    rows: list[dict[str, Any]] = [
        {"name": "fleet", "value": str(shape), "unit": ""},
        {"name": "time under load", "value": minutes, "unit": "minutes"},
        {"name": "workers killed", "value": sum(not fault.is_stop for fault in faults), "unit": "workers"},
        {"name": "workers stopped", "value": sum(fault.is_stop for fault in faults), "unit": "workers"},
        *verdict_rows(load.outcomes),
        at_least("recoveries", metrics.total("distserve:recoveries_total"), "requests", 1 if faults else 0),
        *silence_rows(faults, load.outcomes),
        {"name": "longest request, recoveries included", "value": round(took_s, 1), "unit": "s"},
        exactly("blocks in use afterwards", metrics.blocks_in_use, "blocks", 0),
        exactly("processes more than at the start", after - before, "processes", 0),
        exactly("names in /dev/shm that are not those of the start", len(set(left_names) ^ set(names)), "names", 0),
        exactly("run directories left after the stop", left_dirs, "directories", 0),
        at_most("resident memory, late over early", round(growth, 3), "", MAX_GROWTH),
    ]
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
