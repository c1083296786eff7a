"""Kills and stops replicas of a served model under load, at random moments, and judges what came of every request.

    python -m tools.proofs.fault_storm --kills 200 --output docs/results/fault-storm.json

Clients send a few requests over and over, greedy and seeded, streamed and not, through `ensemble` and `scheduler`,
over gRPC and HTTP. What each must give, whatever is lost meanwhile, is what it gave when it was served alone: no
request may fail, and no stream be silent for long. Roles are struck by turns, now and then by SIGSTOP, and two replicas
at once. The model is tiny, on the CPU and in float64, where outputs are the same whatever the batch.
"""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ensemble.config import Deployment
from tools.benchmarks.results import at_least, at_most, exactly, report
from tools.proofs.faults import Fault, Shape, list_fleet, silence_rows, strike, verdict_rows
from tools.proofs.grpc_request import Inputs
from tools.proofs.known_requests import (
    COMPLETE,
    REQUEST_TIMEOUT_S,
    Load,
    Outcome,
    alone,
    any_model,
    judge,
    make_inputs,
    send,
)
from tools.proofs.soak_swaps import VOCAB_SIZE, write_model
from tools.server.server_state import Metrics
from tools.server.triton_server import TritonServer

Row = dict[str, Any]
NUM_KNOWN = 24
SERVICE_GOAL_S = 10.0  # after a fault, without the time that a replica takes to load
UP_TIMEOUT_S = READY_TIMEOUT_S = 120.0
# Its next life would be delayed, as in a crash loop, if it were struck sooner (replicas/supervisor.py).
MIN_LIFE_S = 10.5
STOP_EVERY, TWO_EVERY = 5, 7  # faults


def storm(
    server: TritonServer,
    load: Load,
    num_faults: int,
    load_s: float,
    rng: random.Random,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Fault]:
    """Strikes one role after the other, each time when requests sent since the last fault are served again.

    Of a group every rank has its turn.
    """
    faults: list[Fault] = []
    up_since: dict[int, float] = {}
    roles = sorted({row.role for row in list_fleet(server)})
    for index in range(num_faults):
        role, num_struck = roles[index % len(roles)], 2 if index % TWO_EVERY == TWO_EVERY - 1 else 1
        deadline = time.monotonic() + UP_TIMEOUT_S
        while True:
            now, fleet = time.monotonic(), list_fleet(server)
            up_since = {row.replica: up_since.get(row.replica, now) for row in fleet if row.state == "up"}
            ripe = [row for row in fleet if up_since.get(row.replica, now) <= now - MIN_LIFE_S]
            first = min((row for row in ripe if row.role == role), key=lambda row: up_since[row.replica], default=None)
            if first is not None and len(up_since) == len(fleet) and len(ripe) >= min(num_struck, len(fleet)):
                break
            if now > deadline:
                return faults  # their number tells
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.5))  # a random moment
        others = [row for row in ripe if row.replica != first.replica]
        struck = [first, *rng.sample(others, min(num_struck - 1, len(others)))]
        is_stop, turn = index % STOP_EVERY == STOP_EVERY - 1, index // len(roles)
        fault = strike(server, struck, is_stop=is_stop, load_s=load_s, turn=turn)
        faults.append(fault)
        for row in struck:
            up_since.pop(row.replica)
        while (served := load.first_served_after(fault.struck_at)) is None:
            if time.monotonic() > fault.struck_at + REQUEST_TIMEOUT_S:
                return faults  # its served_at tells
            time.sleep(0.02)
        fault.served_at = served.ended_at
        if index % 10 == 9:
            progress(f"{index + 1} faults, {dict(load.verdicts())}")
    time.sleep(1.0)
    return faults


def settled(server: TritonServer, timeout_s: float = 15.0) -> float:
    """Waits until no block is in use, and returns the number that are after all."""
    deadline = time.monotonic() + timeout_s
    while (left := Metrics(server).blocks_in_use) != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def storm_rows(
    faults: list[Fault], num_asked: int, outcomes: list[Outcome], num_recoveries: float, load_s: float
) -> list[Row]:
    """What the storm shows. `num_asked`: faults; `load_s`: a replica's start."""
    served = [each for each in outcomes if each.verdict == COMPLETE]
    # Of a prefill replica that died after it had handed their KV on: nothing of them was computed again.
    survivors = {
        id(each)
        for fault in faults
        if "prefill" in fault.roles
        for each in served
        if 0 < each.decode_joined_ns < fault.struck_at_ns and fault.struck_at < each.ended_at
    }
    back_s = [f.served_at - f.struck_at if f.served_at is not None else float("inf") for f in faults]
    goal_s = round(SERVICE_GOAL_S + load_s + max((fault.max_silence_s for fault in faults), default=0.0), 1)
    num_stops = sum(len(fault.roles) for fault in faults if fault.is_stop)
    ranks = Counter(f"{role} {rank}" for fault in faults for role, rank in zip(fault.roles, fault.ranks, strict=True))
    return [
        at_least("faults", len(faults), "faults", num_asked),
        {"name": "struck: role and rank", "value": dict(sorted(ranks.items())), "unit": "times"},
        {"name": "replicas killed", "value": sum(len(f.roles) for f in faults) - num_stops, "unit": "replicas"},
        {"name": "replicas stopped", "value": num_stops, "unit": "replicas"},
        {"name": "faults of two at once", "value": sum(len(f.roles) > 1 for f in faults), "unit": "faults"},
        *verdict_rows(outcomes),
        at_least("recoveries", num_recoveries, "requests", 1),
        *silence_rows(faults, outcomes),
        at_most("fault to service", round(max(back_s, default=0.0), 1), "s", goal_s),
        {"name": "requests that outlived a prefill replica", "value": len(survivors), "unit": "requests"},
        {"name": "kill to the end of the process", "value": round(max(_gone_s(faults), default=0.0), 3), "unit": "s"},
    ]


def _gone_s(faults: list[Fault]) -> list[float]:
    return [fault.gone_s for fault in faults if not fault.is_stop]


def cpu_storm(
    shape: Shape, model: Path, num_faults: int, num_clients: int, seed: int, log: Path, progress: Callable[[str], None]
) -> list[Row]:
    fields = shape.fields(["cpu"])
    for home in ("prefill", "decode"):
        fields[home] |= {"kv_cache_bytes": 16 << 20, "num_threads": 1}
    deployment = Deployment.parse({"model": {"path": model, "dtype": "float64"}, "hang_timeout_s": 2.0} | fields)
    rng = random.Random(seed)
    asked = [make_inputs(rng, VOCAB_SIZE) for _ in range(NUM_KNOWN)]
    return storm_fleet(deployment, asked, num_faults, num_clients, rng, log, shape, progress)


def storm_fleet(
    deployment: Deployment,
    asked: list[Inputs],  # what the clients send
    num_faults: int,
    num_clients: int,
    rng: random.Random,
    log: Path,
    shape: Shape | None = None,  # None: roles are the deployment's
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """A server of its own under load and faults. Raises ServerError."""
    start = time.monotonic()
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=READY_TIMEOUT_S)
        load_s = time.monotonic() - start
        if shape is not None:
            shape.assign_roles(server)
        known = [alone(server, inputs) for inputs in asked]

        def send_one(rng: random.Random) -> Outcome:
            asked = rng.choice(known)
            over_http = rng.random() < 0.5
            return judge(asked, send(server, asked.inputs, any_model(rng, asked), over_http, REQUEST_TIMEOUT_S))

        with Load(send_one, num_clients) as load:
            faults = storm(server, load, num_faults, load_s, rng, progress)
        num_recoveries = Metrics(server).total("distserve:recoveries_total")
        again = [judge(each, send(server, each.inputs, "scheduler", False, REQUEST_TIMEOUT_S)) for each in known]
        left = settled(server)
    return [
        *storm_rows(faults, num_faults, load.outcomes, num_recoveries, load_s),
        exactly("after the storm: outputs that are not what they were", sum(each.is_fault for each in again), "", 0),
        exactly("after the storm: blocks in use", left, "blocks", 0),
    ]


def main(
    kills: Annotated[int, typer.Option(min=1, help="faults, divided over the fleets")] = 200,
    fleet: Annotated[list[str] | None, typer.Option(help="such as 1P1D, 2P1D1M, 2M; default: several")] = None,
    clients: int = 8,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the servers' logs here")] = None,
) -> None:
    """Exit status 1 if a request failed, an output differs, or a stream was silent for too long."""
    console, rows = Console(width=150, highlight=False), []
    shapes = [Shape.parse(name) for name in fleet or ("2P2D", "1P1D1M", "2M")]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        for index, shape in enumerate(shapes):
            count = kills * (index + 1) // len(shapes) - kills * index // len(shapes)
            log = (log_dir or Path(folder)) / f"fault-storm-{shape}.log"
            found = cpu_storm(shape, model, count, clients, seed, log, lambda line: console.print(f"{shape}: {line}"))  # noqa: B023
            rows += [row | {"name": f"{shape}: {row['name']}"} for row in found]
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
