"""What steps of a replica take with one rank, two that divide its layers, or two places of a pipeline.

Its processes are those that a stage starts, commanded as a stage does it: their loop, followers and graphs are timed.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ensemble.config import DEPLOYMENT_VARIABLE, GPU_BLOCK_SIZE, Deployment
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.rank_processes import RankProcesses, SeenStep
from tools.benchmarks.sections import Row

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,
}
ALONE = "one rank"
LAYOUTS = {ALONE: (1, 1), "tp=2": (2, 1), "pp=2": (1, 2)}  # tp, pp
NUM_WARM_UP = 4  # steps, or prompts


@dataclass(frozen=True, slots=True)
class Load:
    model: str
    config: dict[str, Any]
    dtype: str
    block_size: int
    num_rows: int  # of a decode step
    num_micro_rows: int  # in each micro-batch
    context_len: int  # before the first of `num_steps`
    num_steps: int
    prompt_len: int
    num_prompts: int
    stage: dict[str, Any]
    is_dry: bool = False  # nothing is measured against a goal

    def goal(self, goal: float) -> float | None:
        return None if self.is_dry else goal


def load_for(device: str, model: str) -> Load:
    if device == "cpu":
        stage = {"kv_cache_bytes": 32 << 20, "num_threads": 1}
        return Load("tiny", TINY, "float32", 16, 4, 4, 24, 16, 64, 8, stage, is_dry=True)
    return Load(model, SHAPES[model].config, "float16", GPU_BLOCK_SIZE, 32, 64, 512, 64, 2048, 24, {})


def replica_rows(load: Load, devices: list[str], layout: str, measures: list[str], run_dir: Path) -> Iterator[Row]:
    deployment = deploy(load, devices, layout, run_dir)
    deployment_file = run_dir / "deployment.yaml"
    deployment_file.write_text(deployment.to_yaml(), encoding="utf-8")
    os.environ[DEPLOYMENT_VARIABLE] = str(deployment_file)
    random.seed(0)
    start = time.monotonic()
    with RankProcesses(deployment, run_dir) as replica:
        replica.wait_until_up(timeout_s=600.0)  # the section's limit is less
        yield {"name": f"{load.model}, {layout}: ranks up", "value": round(time.monotonic() - start, 1), "unit": "s"}
        for name in measures:
            try:
                measured = MEASURES[name](replica, load, deployment.decode.pipeline_parallel_size)
            except (RuntimeError, TimeoutError) as error:
                measured = {"value": str(error), "unit": "", "met": False}
            yield {"name": f"{load.model}, {layout}: {name}"} | measured


def deploy(load: Load, devices: list[str], layout: str, run_dir: Path) -> Deployment:
    tp, pp = LAYOUTS[layout]
    path = run_dir / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(load.config), encoding="utf-8")
    decode = {
        "devices": devices[: tp * pp],
        "tp": tp,
        "pp": pp,
        "max_num_seqs": max(load.num_rows, load.num_micro_rows * pp),
        "batching": "prefill-first",  # all rows begin to decode together
    }
    return Deployment.parse(
        {
            "mode": "colocated",
            "model": {"path": path, "dtype": load.dtype, "load_format": "dummy"},
            "prefill": {"max_num_batched_tokens": load.prompt_len, "prefix_cache": False},
            "decode": decode | load.stage,
            "block_size": load.block_size,
        }
    )


def decode_step(replica: RankProcesses, load: Load, num_places: int) -> Row:
    seconds = decode_seconds(replica, load, load.num_rows, num_places)
    return {"value": round(seconds * 1e3, 3), "unit": "ms", "rows": load.num_rows} | mean_context(load)


def decode_throughput(replica: RankProcesses, load: Load, num_places: int) -> Row:
    seconds = decode_seconds(replica, load, load.num_micro_rows, num_places)
    rate = load.num_micro_rows / seconds
    return {
        "value": round(rate, 1),
        "unit": "tokens/s",
        "rows": num_places * load.num_micro_rows,
        "step_ms": round(seconds * 1e3, 3),
    } | mean_context(load)


def mean_context(load: Load) -> Row:
    return {"mean_context": load.context_len + load.num_steps // 2}


def decode_seconds(replica: RankProcesses, load: Load, num_rows: int, num_places: int) -> float:
    """Between the ends of steps with so many rows each, as many in flight as there are places."""
    prompts = make_prompts(load, num_places * num_rows, load.context_len)
    steps = replica.run(prompts, load.num_steps + NUM_WARM_UP)
    full = [step for step in steps if step.num_rows == num_rows and not step.num_prompt_tokens]
    if len(full) < num_places * load.num_steps // 2:
        raise RuntimeError(f"only {len(full)} of {len(steps)} steps had {num_rows} rows")
    return seconds_each(full[NUM_WARM_UP:], num_places)


def prefill(replica: RankProcesses, load: Load, num_places: int) -> Row:
    """Of one prompt at a time, from its launch to its token."""
    step_s, seen_s = [], []
    for prompt in make_prompts(load, load.num_prompts // 2 + NUM_WARM_UP, load.prompt_len):
        start = time.monotonic()
        [step] = replica.run([prompt], max_tokens=1)
        step_s.append(num_places * step.seconds)
        seen_s.append(step.at - start)
    value, seen = (median(each[NUM_WARM_UP:]) * 1e3 for each in (step_s, seen_s))
    return {"value": round(value, 2), "unit": "ms", "tokens": load.prompt_len, "seen_by_the_stage_ms": round(seen, 2)}


def prompts_in_a_row(replica: RankProcesses, load: Load, num_places: int) -> Row:
    """With as many prompts in flight as there are places."""
    prompts = make_prompts(load, load.num_prompts + NUM_WARM_UP, load.prompt_len)
    steps = replica.run(prompts, max_tokens=1)
    if len(steps) != len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts took {len(steps)} steps")
    steps = steps[NUM_WARM_UP:]
    rate = load.prompt_len / seconds_each(steps, num_places)
    mean_rate = load.prompt_len * (len(steps) - 1) / (steps[-1].at - steps[0].at)
    return {"value": round(rate, 1), "unit": "tokens/s", "tokens": load.prompt_len, "mean": round(mean_rate, 1)}


def seconds_each(steps: list[SeenStep], num_places: int) -> float:
    """The median time of a step, while those of other places run: of so many that follow one another, its share."""
    spans = [last.at - first.at for first, last in zip(steps, steps[num_places:], strict=False)]
    return median(spans) / num_places


def make_prompts(load: Load, num_prompts: int, prompt_len: int) -> list[list[int]]:
    return [random.choices(range(3, load.config["vocab_size"]), k=prompt_len) for _ in range(num_prompts)]


Measure = Callable[[RankProcesses, Load, int], Row]
MEASURES: dict[str, Measure] = {
    "decode step": decode_step,
    "prefill": prefill,
    "prefill, prompts in a row": prompts_in_a_row,
    "decode, rows in each micro-batch": decode_throughput,
}
