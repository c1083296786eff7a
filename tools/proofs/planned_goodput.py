"""What tools.plan chose for four GPUs beside what it rejected, and four colocated replicas, under the same load.

The plans lie in docs/results/four-gpus, for each kind of GPU, with the goodput that was predicted; where they do not,
the planner makes them.
Each server gets rates by bisection around what was predicted, until its goodput lies between two that differ by 8 %.
"""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ensemble.config import Deployment
from ensemble.models.spec import load_model_spec
from ensemble.tokenizer import Tokenizer
from tools.bench_goodput import deployment_of
from tools.bench_serving import default_processes
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.results import at_least
from tools.installation.server_files import ServerError
from tools.load.client_process import LoadError
from tools.load.goodput import SHARE, Goodput, goodput
from tools.load.load import Load, put
from tools.load.records import describe
from tools.load.summary import why_invalid
from tools.load.workloads import Workload
from tools.proofs.gpu_smoke import READY_TIMEOUT_S, write_model_dir
from tools.proofs.sections import Row, failed
from tools.server.tiny_server import TINY_MODEL
from tools.server.triton_server import TritonServer
from tools.simulation.costs import GPUS

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "docs/results/four-gpus"
NUM_GPUS, NUM_ALTERNATIVES = 4, 2
ENDPOINT = "scheduler"  # by token ids: texts of so many exact lengths take long to make
GOAL = 0.97  # of the best of the others
STEP, RESOLUTION = 1.3, 1.08  # of two rates: until the goodput lies between them, and then at last
PLAN_TIMEOUT_S, REQUEST_TIMEOUT_S = 900.0, 60.0
CPU_STAGE = {"num_threads": 1, "kv_cache_bytes": 32 << 20}
CPU_SCALE, CPU_RATE = 0.02, 8.0  # of lengths; requests a second to begin with


@dataclass(frozen=True, slots=True)
class Case:
    """A model under a load."""

    shape: str
    workload: Workload
    targets_ms: dict[str, float]
    colocated: str  # mode of tools.bench_goodput: the best chunk of one GPU by the planner's own trials

    def plan_arguments(self, gpu: str) -> list[str]:
        """Of tools.plan."""
        load = ["--endpoint", ENDPOINT, "--dataset-name", self.workload.name]
        load += ["--output-len", str(self.workload.output_len)] if self.workload.output_len else []
        if self.workload.name == "random":
            load += ["--input-len", str(self.workload.input_len), "--range-ratio", str(self.workload.range_ratio)]
        targets = [word for metric, ms in self.targets_ms.items() for word in ("--goodput", f"{metric}:{ms:g}")]
        return ["--model", self.shape, "--gpu", gpu, "--gpus-per-node", str(NUM_GPUS), *load, *targets]


CASES = {
    "summary": Case("LLaMA-2-13B", Workload("summary", output_len=16), {"ttft": 1000.0, "itl": 20.0}, "colocated:256"),
    "chat": Case("OPT-13B", Workload("chat"), {"ttft": 250.0, "tpot": 40.0}, "colocated"),
    "long": Case(  # prompts of 8,000 to 30,000 tokens; targets near three prefills and 1.5 decode steps
        "LLaMA-3-8B",
        Workload("random", input_len=19_000, output_len=200, range_ratio=0.58),
        {"ttft": 2000.0, "itl": 10.0},
        "colocated:256",
    ),
}


def kind_of_gpu(device: str) -> str:
    """As tools.plan knows it: that of the oldest where there is none."""
    name = torch.cuda.get_device_name(device).lower() if device != "cpu" else ""
    return next((gpu for gpu in GPUS if gpu in name), "h100")


def plan_files(name: str, plans: Path, gpu: str, folder: Path) -> list[Path]:
    """The planner's choice, and two that it rejected; made where they are not there, which takes minutes.

    gpu: one of tools.plan's. Raises ServerError where it fails.
    """
    plans = plans / gpu
    files = [plans / f"{name}{suffix}.yaml" for suffix in ("", *(f"-{n + 2}" for n in range(NUM_ALTERNATIVES)))]
    if not all(file.exists() for file in files):
        plans.mkdir(parents=True, exist_ok=True)
        case = CASES[name]
        write_model_dir(folder / case.shape, SHAPES[case.shape].config)
        command = [sys.executable, "-m", "tools.plan", *case.plan_arguments(gpu)]
        command += ["--out", str(files[0].resolve()), "--alternatives", str(NUM_ALTERNATIVES)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        # In that folder: the file names the model as it is named here, not where it lies.
        done = subprocess.run(command, cwd=folder, env=environment, timeout=PLAN_TIMEOUT_S, check=False)
        if done.returncode:
            raise ServerError(f"tools.plan ended with status {done.returncode}")
    return files


def heading(file: Path) -> tuple[str, float]:
    """What a planned file is, and the requests a second that were predicted. Raises ValueError."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    found = re.fullmatch(r"# (.+): ([\d.]+) requests/s.*", first)
    if found is None:
        raise ValueError(f"{file}: begins with {first!r}, not as tools.plan writes it")
    return found[1], float(found[2])


def goodputs(
    folder: Path, logs: Path, devices: Sequence[str], name: str, plans: Path, seconds: float, limit_s: float
) -> Iterator[Row]:
    """Of a case. `seconds`: of arrivals, at each rate; `limit_s`: for all servers together."""
    case, on_gpus = CASES[name], devices[0] != "cpu"
    model = folder / "served"
    write_model_dir(model, SHAPES[case.shape].config if on_gpus else TINY_MODEL | {"max_position_embeddings": 2048})
    files = plan_files(name, plans, kind_of_gpu(devices[0]), folder / "plan")
    modes = {heading(file)[0]: str(file) for file in files} | {"four colocated replicas": case.colocated}
    predicted = dict(map(heading, files))
    [choice, *others] = modes
    found: dict[str, Goodput] = {}
    for index, (label, mode) in enumerate(modes.items()):
        deployment = deployment_for(mode, model, devices)
        first = 0.9 * predicted.get(label, predicted[choice]) if on_gpus else CPU_RATE
        row_name = f"goodput, {name}, {label}"
        try:
            deadline_s = limit_s / len(modes)
            log = logs / f"goodput-{name}-{index}.log"
            scale = 1.0 if on_gpus else CPU_SCALE
            ready_s, points, invalid = served(deployment, case, log, first, seconds, deadline_s, scale)
        except Exception as error:  # the other servers' results are worth having
            yield failed(row_name, error)
            continue
        yield {"name": f"{row_name}: start to ready", "value": round(ready_s, 1), "unit": "s"}
        for rate, share in sorted(points.items()):
            unit = f"of the requests: {describe(case.targets_ms)}"
            yield {"name": f"{row_name}, {rate:.2f}/s", "value": round(share, 4), "unit": unit}
        for reason in invalid:
            yield {"name": f"{row_name}: a run that does not count", "value": reason, "unit": "", "met": False}
        reached = goodput(sorted(points.items()))
        found[label] = reached
        unit = f"{reached.bound} requests/s".strip()
        row = {"name": f"{row_name}: goodput at {SHARE:.0%}", "value": round(reached.rate, 2), "unit": unit}
        yield row | ({"predicted": predicted[label]} if label in predicted else {})
    if choice in found and (rest := [label for label in others if label in found]):
        best = max(rest, key=lambda label: found[label].rate)
        yield verdict(f"goodput, {name}: the planner's choice over the best other, {best}", found[choice], found[best])


def verdict(name: str, choice: Goodput, best: Goodput) -> Row:
    """Not met either where the choice has less than was measured, or the other more: time was short then."""
    row = at_least(name, round(choice.rate / best.rate, 3), "of its goodput", GOAL)
    is_known = choice.bound != "less than" and best.bound != "at least"
    return row | {"met": row["met"] and is_known, "seen": [f"{choice}/s", f"{best}/s"]}


def deployment_for(mode: str, model: Path, devices: Sequence[str]) -> Deployment:
    """Of a mode of tools.bench_goodput, on these devices where its file says cuda:0 to cuda:3. Raises ConfigError."""
    on_gpus = devices[0] != "cpu"
    fields: dict[str, Any] = {"model.path": model, "model.load_format": "dummy"}
    fields["model.dtype"] = "float16" if on_gpus else "float32"
    if not on_gpus:
        fields |= {f"{side}.{name}": value for side in ("prefill", "decode") for name, value in CPU_STAGE.items()}
    if mode.endswith(".yaml"):
        planned = Deployment.from_yaml(mode)
        for side, stage in (("prefill", planned.prefill), ("decode", planned.decode)):
            fields[f"{side}.devices"] = [devices[int(each.removeprefix("cuda:"))] for each in stage.devices]
    return deployment_of(mode, ",".join(devices), fields)


def served(
    deployment: Deployment, case: Case, log: Path, first: float, seconds: float, limit_s: float, scale: float
) -> tuple[float, dict[float, float], list[str]]:
    """Seconds from the start to ready, at each rate the share of the requests that met the targets, and why no more
    rates were tried, if the client was too slow for one.

    Raises ServerError; LoadError where no run counts.
    """
    start = time.monotonic()
    workload = replace(case.workload, scale=scale)
    invalid: list[str] = []
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=READY_TIMEOUT_S)
        ready_s = time.monotonic() - start
        tokenizer = Tokenizer.from_dir(deployment.model.path)
        max_model_len = load_model_spec(deployment.model.path).max_model_len

        def attainment(rate: float) -> float | None:
            number = max(1, round(rate * seconds))
            load = Load(workload, number, rate, endpoint=ENDPOINT, timeout_s=REQUEST_TIMEOUT_S)
            requests = load.requests(tokenizer, max_model_len)
            run = put(server.grpc_url, load, requests, num_processes=num_processes(), num_warmups=8)
            if run.is_valid:
                return run.attainment(case.targets_ms)
            invalid.append(f"{rate:.2f}/s: {why_invalid(run)}")
            return None

        points = search(attainment, first, lambda: time.monotonic() + 1.3 * seconds < start + limit_s)
    if not points:
        raise LoadError(invalid[0])
    return ready_s, points, invalid


def num_processes() -> int:
    """Of the client: more where four would leave many cores idle."""
    return max(default_processes(), (os.cpu_count() or 1) // 8)


def search(
    attainment: Callable[[float], float | None], first: float, has_time: Callable[[], bool]
) -> dict[float, float]:
    """Rate |-> what was attained there, of rates around the goodput; none after one that gave nothing."""
    points: dict[float, float] = {}
    rate: float | None = first
    while rate is not None and (not points or has_time()):
        if (share := attainment(rate)) is None:
            break
        points[rate] = share
        rate = next_rate(points)
    return points


def next_rate(points: Mapping[float, float]) -> float | None:
    """None: the goodput is known well enough."""
    high = min((rate for rate, share in points.items() if share < SHARE), default=None)
    low = max((rate for rate in points if high is None or rate < high), default=None)
    if high is None:
        return max(points) * STEP
    if low is None:
        return high / STEP
    return None if high / low <= RESOLUTION else math.sqrt(low * high)
