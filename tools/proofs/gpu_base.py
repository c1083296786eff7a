"""Runs on GPUs what no CPU shows: deaths in mid-transfer, memory shares, hand-off between two GPUs, a clean end.

    python -m tools.proofs.gpu_base --output docs/results/gpu-base.json

faults    a model with little to compute and 1.6 GB of KV a prompt, whose prompts are cached, so that copies by CUDA IPC
          are under way most of the time; replicas of every role are killed and stopped under load
          (tools.proofs.fault_storm). In float32, so that outputs are the same whatever the batch. With two GPUs, KV
          goes from each to the other.
deaths    the exporter, then the importer of a pool is killed in the midst of a copy (tools.proofs.transfer_deaths)
shares    both stages on one GPU with 0.45 of its memory each; and with shares that are too small
two-gpus  tools.proofs.gpu_smoke's shapes from cuda:0 to cuda:1, where there are two; tools.benchmarks.transfer has the
          copy's rate
"""

import os
import random
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from ensemble.config import GPU_BLOCK_SIZE, Deployment
from tools.benchmarks.results import at_most
from tools.installation.server_files import ServerError
from tools.proofs.fault_storm import settled, storm, storm_rows
from tools.proofs.faults import Shape
from tools.proofs.gpu_smoke import SHAPES, greedy_inputs, make_requests, run_shape, serve, write_model_dir
from tools.proofs.known_requests import REQUEST_TIMEOUT_S, Load, Outcome, alone, judge, send
from tools.proofs.sections import Row, Section, run_sections
from tools.proofs.transfer_deaths import death_rows
from tools.server.processes import session_pids
from tools.server.server_state import Metrics, workers
from tools.server.triton_server import TritonServer

FAULTS_MODEL: Row = {  # 786 KB of KV a token in fp32
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 2304,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 1024,
    "eos_token_id": 2,
}
NUM_PROMPTS, PROMPT_LEN, MAX_TOKENS, NUM_CLIENTS = 6, 2000, 8, 16
FAULTS_SHAPES = [Shape(2, 2, 0), Shape(1, 1, 1)]  # on two GPUs: two replicas on each at most
PREFILL_KV_BYTES, DECODE_KV_BYTES = 24 << 30, 30 << 30
MEMORY_TOLERANCE_MIB = 256  # what is left is under a CUDA context (500 MiB) or a mapped pool
LEFT_TOLERANCE_MIB = 64  # after a stop
SHARE, TOO_SMALL_SHARE = 0.45, 0.02
SETTLE_S = 5.0  # for the driver to take back what a dead process had


class Machine:
    """What nvidia-smi, /proc and /dev/shm say. It makes no CUDA context, which would show in its own figures."""

    def __init__(self) -> None:
        self._memory, self.pids, self._names = gpu_memory_mib(), set(gpu_processes()), shm_names()

    def left_rows(self, session: int) -> list[Row]:
        """Of a server that has been stopped: what it left behind, against the time when this was made."""
        deadline = time.monotonic() + SETTLE_S
        while excess_mib(self._memory) > LEFT_TOLERANCE_MIB and time.monotonic() < deadline:
            time.sleep(0.2)
        names = sorted(shm_names() - self._names)
        processes = {*session_pids(session), *(set(gpu_processes()) - self.pids)}
        return [
            at_most(
                "after the stop: GPU memory over that before the start",
                excess_mib(self._memory),
                "MiB",
                LEFT_TOLERANCE_MIB,
            ),
            at_most("after the stop: processes left", len(processes), "processes", 0),
            at_most("after the stop: names left in /dev/shm", len(names), "names", 0) | {"seen": names[:5]},
        ]


def nvidia_smi(query: str) -> list[list[int]]:
    """The numbers of a query, a list for each line; a line that holds something else is left out."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [[int(cell) for cell in line] for line in cells if all(cell.isdigit() for cell in line)]


def gpu_memory_mib() -> list[int]:
    """In use, by all processes, of each GPU."""
    return [used for (used,) in nvidia_smi("gpu=memory.used")]


def gpu_processes() -> dict[int, int]:
    """pid |-> MiB, on all GPUs; empty where nvidia-smi cannot tell."""
    found: dict[int, int] = {}
    for pid, used in nvidia_smi("compute-apps=pid,used_memory"):
        found[pid] = found.get(pid, 0) + used
    return found


def excess_mib(before: list[int]) -> int:
    """Memory in use over `before`, of the GPU where it is most."""
    return max((now - then for now, then in zip(gpu_memory_mib(), before, strict=True)), default=0)


def shm_names() -> set[str]:
    return set(os.listdir("/dev/shm"))


def fault_rows(deployment: Deployment, shape: Shape, prompts: list[list[int]], kills: int, log: Path) -> Iterable[Row]:
    machine = Machine()
    start = time.monotonic()
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=300)
        load_s = time.monotonic() - start
        session = server.pid
        shape.assign_roles(server)
        known = [alone(server, greedy_inputs(prompt, MAX_TOKENS)) for prompt in prompts]

        def send_one(rng: random.Random) -> Outcome:
            asked = rng.choice(known)
            return judge(asked, send(server, asked.inputs, "scheduler", over_http=False, stay_s=REQUEST_TIMEOUT_S))

        with Load(send_one, NUM_CLIENTS) as warm:
            time.sleep(5.0)
        settled(server)
        before = gpu_memory_mib()
        with Load(send_one, NUM_CLIENTS) as load:
            faults = storm(server, load, kills, load_s, random.Random(0))
        num_recoveries = Metrics(server).total("distserve:recoveries_total")
        again = [alone(server, each.inputs) for each in known]
        blocks = settled(server)
        deadline = time.monotonic() + SETTLE_S
        while excess_mib(before) > MEMORY_TOLERANCE_MIB and time.monotonic() < deadline:
            time.sleep(0.2)
        left_mib = excess_mib(before)
        strangers = set(gpu_processes()) - machine.pids - set(session_pids(session))
    faults_in_log = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "CUDA error" in line
    ]
    copying = sum(each.copy_s for each in warm.outcomes) / 5.0
    yield {"name": "start to ready", "value": round(load_s, 1), "unit": "s"}
    yield {"name": "distinct outputs of the prompts", "value": len({*(each.text for each in known)}), "unit": "outputs"}
    yield {"name": "time with a KV copy under way, before the kills", "value": round(copying, 2), "unit": "of the time"}
    yield from storm_rows(faults, kills, [*load.outcomes, *warm.outcomes], num_recoveries, load_s)
    differ = sum(now.output_ids != then.output_ids for now, then in zip(again, known, strict=True))
    yield at_most("after the kills: outputs that differ from before", differ, "requests", 0)
    yield at_most("after the kills: blocks in use", blocks, "blocks", 0)
    yield at_most(
        "after the kills: GPU memory over that after warm-up", left_mib, "MiB", MEMORY_TOLERANCE_MIB
    )  # of the GPU where it is most
    yield at_most("after the kills: processes on a GPU that are not the server's", len(strangers), "processes", 0)
    seen = faults_in_log[:3]
    yield {"name": "CUDA errors in the server's log", "value": len(faults_in_log), "unit": "lines", "seen": seen}
    yield from machine.left_rows(session)


def faults(folder: Path, logs: Path, devices: list[str], kills: int) -> Iterable[Row]:
    write_model_dir(folder / "model", FAULTS_MODEL)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, FAULTS_MODEL["vocab_size"]) for _ in range(PROMPT_LEN)] for _ in range(NUM_PROMPTS)]
    for index, shape in enumerate(FAULTS_SHAPES):
        fields = shape.fields(devices)
        fields["prefill"] |= {"kv_cache_bytes": PREFILL_KV_BYTES, "prefix_cache": True}
        fields["decode"] |= {"kv_cache_bytes": DECODE_KV_BYTES, "max_num_seqs": 32}
        model = {"path": folder / "model", "dtype": "float32", "load_format": "dummy"}
        deployment = Deployment.parse({"model": model, "block_size": GPU_BLOCK_SIZE} | fields)
        count = kills * (index + 1) // len(FAULTS_SHAPES) - kills * index // len(FAULTS_SHAPES)
        for row in fault_rows(deployment, shape, prompts, count, logs / f"faults-{shape}.log"):
            yield row | {"name": f"faults, {shape} on {len(devices)} GPUs: {row['name']}"}


def shares(folder: Path, logs: Path) -> Iterable[Row]:
    write_model_dir(folder / "model", SHAPES["OPT-1.3b"])
    model = {"path": folder / "model", "dtype": "float16", "load_format": "dummy"}

    def deployment(share: float) -> Deployment:
        stage = {"devices": ["cuda:0"], "gpu_memory_utilization": share}
        return Deployment.parse({"model": model, "prefill": stage, "decode": stage, "block_size": GPU_BLOCK_SIZE})

    machine = Machine()
    used_before = gpu_memory_mib()[0]
    [total] = nvidia_smi("gpu=memory.total")[0]
    with TritonServer(deployment(SHARE), log_path=logs / "shares.log") as server:
        server.wait_ready(timeout_s=300)
        session = server.pid
        serve(server, make_requests(64, SHAPES["OPT-1.3b"]["vocab_size"], 64))
        used, by_process, pids = gpu_memory_mib()[0] - used_before, gpu_processes(), [p.pid for p in workers(server)]
        kv = [
            line
            for line in server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            if "KV blocks" in line
        ]
    others = sum(mib for pid, mib in by_process.items() if pid not in {*pids, *machine.pids})
    yield {"name": "shares of 0.45: pools by a profiling pass", "value": sorted(kv), "unit": ""}
    for pid in pids:
        mib = by_process.get(pid)
        yield {
            "name": "shares of 0.45: memory of a worker",
            "value": mib and round(mib / total, 3),
            "unit": "of the GPU",
        }
    yield {"name": "shares of 0.45: memory of the server's other processes", "value": others, "unit": "MiB"}
    both = round((used - others) / total, 4)
    yield at_most("shares of 0.45: memory of both workers", both, "of the GPU", 2 * SHARE)
    yield from ({**row, "name": f"shares of 0.45: {row['name']}"} for row in machine.left_rows(session))

    reason = "it started"
    with TritonServer(deployment(TOO_SMALL_SHARE), log_path=logs / "too-small.log") as server:
        try:
            server.wait_ready(timeout_s=300)
        except ServerError as error:
            reason = str(error)
    is_named = reason.startswith(f"gpu_memory_utilization = {TOO_SMALL_SHARE}") and "\n" not in reason
    yield {"name": "a share that is too small", "value": reason, "unit": "", "goal": "one line", "met": is_named}


def two_gpus(folder: Path, logs: Path) -> Iterable[Row]:
    for name, config in SHAPES.items():
        path = folder / name
        write_model_dir(path, config)
        deployment = Deployment.parse(
            {
                "model": {"path": path, "dtype": "float32", "load_format": "dummy"},
                "prefill": {"devices": ["cuda:0"], "gpu_memory_utilization": 0.6},
                "decode": {"devices": ["cuda:1"], "gpu_memory_utilization": 0.6},
                "block_size": GPU_BLOCK_SIZE,
            }
        )
        requests = make_requests(32, config["vocab_size"], 64)
        rows = run_shape(name, deployment, requests, logs / f"{name}.log")
        yield from ({**row, "name": f"cuda:0 to cuda:1, {row['name']}"} for row in rows)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    only: Annotated[list[str] | None, typer.Option(help="faults, deaths, shares, two-gpus. Default: all.")] = None,
    kills: Annotated[int, typer.Option(help="faults, divided over two fleets")] = 40,
    one_gpu: Annotated[bool, typer.Option(help="all replicas on cuda:0 in faults too")] = False,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the servers' logs here")] = None,
) -> None:
    """Exit status 1 if a goal is missed."""
    has_two = torch.cuda.device_count() > 1
    devices = ("cuda:0", "cuda:1") if has_two and not one_gpu else ("cuda:0", "cuda:0")
    gpus = sorted({*devices})
    sections: dict[str, Section] = {
        "faults": lambda folder, logs: faults(folder, logs, gpus, kills),
        "deaths": lambda folder, logs: death_rows(*devices),
        "shares": shares,
    }
    if has_two:
        sections["two-gpus"] = two_gpus  # last: it makes a CUDA context in this process
    run_sections(sections, only, output, log_dir)


if __name__ == "__main__":
    typer.run(main)
