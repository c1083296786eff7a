"""Runs fleets of groups of ranks on four GPUs of one host, through the real server, with dummy weights.

    python -m tools.proofs.four_gpus --log-dir logs --output docs/results/four-gpus.json

equality  greedy tokens of LLaMA-2-13B's shape in fp16 by each fleet, beside one GPU's offline engine, up to near ties
handoff   KV by CUDA IPC from each GPU to each other one, and between one rank and two, beside a contiguous copy
kills     each rank of a replica killed under load: every request completes with the right answer
goodput   tools.plan's choice beside what it rejected and four colocated replicas (planned_goodput.py)

`--devices cpu,cpu,cpu,cpu` runs the same with tiny models.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from ensemble.config import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, Deployment
from ensemble.engine.engine import load_engine
from ensemble.errors import ConfigError
from tools.benchmarks.engine_shapes import SHAPES
from tools.command_line import run
from tools.offline import generate
from tools.proofs.fault_storm import storm_fleet
from tools.proofs.gpu_base import FAULTS_MODEL
from tools.proofs.gpu_smoke import compare, free_memory, make_requests, rows_of, serve_fleet, write_model_dir
from tools.proofs.handoffs import handoffs
from tools.proofs.known_requests import make_inputs
from tools.proofs.planned_goodput import CASES, PLANS, goodputs, kind_of_gpu, plan_files
from tools.proofs.sections import Row, Section, failed, run_sections
from tools.server.degrees import parse_degrees
from tools.server.tiny_server import TINY_MODEL

NUM_DEVICES = 4
KILLS_KV_BYTES = 16 << 30  # of a rank: the next life's pool fits beside one that a peer still has mapped
REFERENCE_KV_BYTES = 16 << 30
NUM_KNOWN, KILLS_MAX_TOKENS, NUM_CLIENTS = 12, 48, 16
# A log-probability in fp16 is off by 0.01 on average at most (as outputs are compared in this project), so with a
# standard deviation of 0.0125; the gap between two tokens, of one run beside another, is the sum of four such errors:
# 0.025. Four of these, for the largest of some ten thousand gaps.
FP16_NEAR_TIE = 0.1
CPU_STAGE = {"num_threads": 1, "kv_cache_bytes": 32 << 20}
SECTIONS = ("equality", "handoff", "kills", *(f"goodput-{name}" for name in CASES))
DEVICES = ",".join(f"cuda:{index}" for index in range(NUM_DEVICES))


@dataclass(frozen=True, slots=True)
class Fleet:
    """Ranks and replicas of the two sides, as `make serve PREFILL= DECODE=` takes them."""

    name: str
    prefill: str
    decode: str

    def deployment(
        self, model: dict[str, Any], devices: Sequence[str], kv_cache_bytes: int | None = None
    ) -> Deployment:
        """Prefill's ranks on the first devices, decode's on those after them. kv_cache_bytes: of a rank, on GPUs."""
        on_gpus = devices[0] != "cpu"
        stages: dict[str, dict[str, Any]] = {}
        left = list(devices)
        for side, words in (("prefill", self.prefill), ("decode", self.decode)):
            fields: dict[str, Any] = dict(parse_degrees(side, words))
            num_ranks = fields.get("tensor_parallel_size", 1) * fields.get("pipeline_parallel_size", 1)
            number = fields.pop("replicas", 1) * num_ranks
            stages[side] = fields | {"devices": left[:number], "kv_cache_bytes": kv_cache_bytes}
            stages[side] |= {} if on_gpus else CPU_STAGE
            del left[:number]
        return Deployment.parse({"model": model, **stages, "block_size": GPU_BLOCK_SIZE if on_gpus else CPU_BLOCK_SIZE})


FLEETS = (
    Fleet("2P2D", "replicas=2", "replicas=2"),
    Fleet("P tp=2, D tp=2", "tp=2", "tp=2"),
    Fleet("P tp=2, two D tp=1", "tp=2", "replicas=2"),
    Fleet("P pp=2, D tp=2", "pp=2", "tp=2"),
)
KILLED_FLEETS = FLEETS[2:]  # a group by either degree and on either side, beside replicas of one rank


def equality(folder: Path, logs: Path, devices: Sequence[str], num_requests: int, max_tokens: int) -> Iterator[Row]:
    """Every fleet first, then the offline engine, which has the first device to itself."""
    on_gpus = devices[0] != "cpu"
    config = SHAPES["LLaMA-2-13B"].config if on_gpus else TINY_MODEL | {"max_position_embeddings": 2048}
    write_model_dir(folder / "model", config)
    model = {"path": folder / "model", "dtype": "float16" if on_gpus else "float32", "load_format": "dummy"}
    requests = make_requests(num_requests, config["vocab_size"], max_tokens)
    served = {}
    for fleet in FLEETS:
        try:
            served[fleet.name] = serve_fleet(fleet.deployment(model, devices), requests, logs / f"{slug(fleet)}.log")
            yield note(f"equality, {fleet.name}: served in", round(served[fleet.name].seconds, 2), "s")
        except Exception as error:  # the other fleets' results are worth having
            yield failed(f"equality, {fleet.name}", error)
    alone = Fleet("one device", "", "").deployment(model, [devices[0]] * 2, REFERENCE_KV_BYTES)
    engine = load_engine(alone, alone.decode, torch.device(devices[0]))
    expected = generate(engine, requests)
    outputs = {tuple(each.output_token_ids) for each in expected.values()}
    yield note("equality: distinct outputs of the offline engine", len(outputs), "outputs")
    for name, each in served.items():
        comparison = compare(engine, requests, expected, each.output_ids, FP16_NEAR_TIE)
        for row in rows_of(name, each, comparison, is_apart=True):
            yield row | {"name": f"equality, {row['name']}"}
        widest = max(comparison.tie_margins, default=0.0)
        yield note(f"equality, {name}: widest near tie", round(widest, 4), f"of {FP16_NEAR_TIE}, log-probability")
    del engine
    free_memory()


def kills(folder: Path, logs: Path, devices: Sequence[str], num_kills: int) -> Iterator[Row]:
    """Of each role in turn, and of each rank of a group: in float32, where outputs are the same whatever the batch."""
    on_gpus = devices[0] != "cpu"
    config = FAULTS_MODEL if on_gpus else TINY_MODEL
    write_model_dir(folder / "model", config)
    model = {"path": folder / "model", "dtype": "float32" if on_gpus else "float64", "load_format": "dummy"}
    for fleet in KILLED_FLEETS:
        rng = random.Random(0)
        asked = [make_inputs(rng, config["vocab_size"], max_tokens=KILLS_MAX_TOKENS) for _ in range(NUM_KNOWN)]
        deployment, log = fleet.deployment(model, devices, KILLS_KV_BYTES), logs / f"kills-{slug(fleet)}.log"
        name = f"kills, {fleet.name}"
        try:
            for row in storm_fleet(deployment, asked, num_kills, NUM_CLIENTS, rng, log):
                yield row | {"name": f"{name}: {row['name']}"}
        except Exception as error:  # the other fleets' results are worth having
            yield failed(name, error)


def note(name: str, value: Any, unit: str) -> Row:
    return {"name": name, "value": value, "unit": unit}


def slug(fleet: Fleet) -> str:
    """For files."""
    return fleet.name.replace(", ", "-").replace(" ", "").replace("=", "")


def main(
    output: Annotated[Path | None, Option(help="JSON file for the results")] = None,
    only: Annotated[list[str] | None, Option(help=f"{', '.join(SECTIONS)}. Default: all.")] = None,
    devices: Annotated[str, Option(help="four of them")] = DEVICES,
    log_dir: Annotated[Path | None, Option(help="keeps the servers' logs here")] = None,
    num_requests: Annotated[int, Option(min=1, help="equality")] = 24,
    max_tokens: Annotated[int, Option(min=1, help="equality: of each request")] = 64,
    num_kills: Annotated[int, Option(min=1, help="kills: of each fleet; every fifth is a stop")] = 4,
    seconds: Annotated[float, Option(min=1, help="goodput: of arrivals, at each rate")] = 15.0,
    limit_s: Annotated[float, Option(min=1, help="goodput: for all servers of a workload")] = 500.0,
    plans: Annotated[Path, Option(help="goodput: folder of the planner's files, made where missing")] = PLANS,
    plan_only: Annotated[bool, Option(help="makes them, and no more")] = False,
) -> None:
    """Exit status 1 if a goal is missed."""
    names = devices.split(",")
    if len(names) != NUM_DEVICES or ("cpu" in names and {*names} != {"cpu"}):
        raise ConfigError(f"--devices {devices}: {NUM_DEVICES} GPUs, or cpu as many times, are needed")
    if plan_only:
        for name in CASES:
            with tempfile.TemporaryDirectory() as folder:
                plan_files(name, plans, kind_of_gpu(names[0]), Path(folder))
        return
    random.seed(0)
    sections: dict[str, Section] = {
        "equality": partial(equality, devices=names, num_requests=num_requests, max_tokens=max_tokens),
        "handoff": lambda folder, logs: handoffs(names),
        "kills": partial(kills, devices=names, num_kills=num_kills),
    }
    for name in CASES:
        run_case = partial(goodputs, devices=names, name=name, plans=plans, seconds=seconds, limit_s=limit_s)
        sections[f"goodput-{name}"] = run_case
    run_sections(sections, only, output, log_dir)


if __name__ == "__main__":
    run(main)
