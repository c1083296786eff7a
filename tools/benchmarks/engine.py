"""Times the engine's steps on one GPU, with dummy weights of published shapes, beside what the hardware allows.

python -m tools.benchmarks.engine --output docs/results/engine.json

decode   a batch of prompts of 512 (2,048) tokens, mean over the next 64 steps; each step is launched before the
         tokens of the one before it are read, as the engine does. Floor: the weights once (the output projection
         included, the input embedding excluded) and the KV of every sequence, over the measured copy rate.
device   the same steps with the launches already waiting: what of the step is the GPU's. The rest is the host gap.
prefill  from the batch to the sampled tokens on the host. Floor: the model's FLOPs over the measured matmul rate.
mixed    a chunk of a prompt beside decode rows, each step launched before the tokens of the one before it are read.
         Floor: the larger of weights over the copy rate and products over the matmul rate, and the KV of every row
         and prefix over the copy rate, and attention's FLOPs over the matmul rate.
host     what launching a decode step of penalised rows costs the host beyond one without penalties.

`--profile` prints the kernels of a mixed step and of a prefill by the time they take.
"""

import random
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ensemble.engine.batch import Batch, PrefillRow
from ensemble.models import layers
from ensemble.request import Request, SamplingParams, Sequence
from tools.benchmarks.engine_bench import MIXED_CONTEXT_LEN, MIXED_PREFIX_LEN, NUM_STEPS, Bench, commit
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.kernels import copy_rate, matmul_rate
from tools.benchmarks.results import write_results

NUM_MIXED_STEPS = 16
HOST_GAP_GOAL = 0.03
DECODE_BATCH_SIZES = (1, 8, 32, 64, 128, 256)
DECODE_PROMPT_LENS = (512, 2048)
PREFILLS = ((1, 512), (1, 1024), (1, 2048), (8, 512), (4, 2048))
MIXED = ((256, 2), (256, 8), (512, 2), (512, 8), (254, 2), (248, 8))  # tokens of the chunk, decode rows
PENALISED_ROWS, PENALISED_CONTEXT_LEN, PENALTY_GOAL_MS = 256, 4000, 1.0


class Step(str, Enum):
    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"
    HOST = "host"


class Linears(str, Enum):
    TRITON = "triton"
    CUBLAS = "cublas"


def rows_of(bench: Bench, steps: Iterable[Step], prompt_lens: Iterable[int]) -> Iterator[dict[str, Any]]:
    yield {"name": f"{bench.name}: start to ready", "value": bench.ready_s, "unit": "s"}
    for step in steps:
        if step == Step.DECODE:
            for prompt_len in prompt_lens:
                for batch_size in bench.batch_sizes:
                    if bench.fits(batch_size, prompt_len + NUM_STEPS):
                        yield from decode_rows(bench, batch_size, prompt_len)
        elif step == Step.PREFILL:
            for batch_size, prompt_len in PREFILLS:
                if bench.fits(batch_size, prompt_len):
                    yield prefill_row(bench, batch_size, prompt_len)
        elif step == Step.MIXED:
            for chunk, num_decodes in MIXED:
                if bench.fits(num_decodes + 1, MIXED_CONTEXT_LEN + NUM_MIXED_STEPS):
                    yield mixed_row(bench, chunk, num_decodes)
        elif bench.spec.max_model_len > PENALISED_CONTEXT_LEN:
            yield penalties_row(bench)


def decode_rows(bench: Bench, batch_size: int, prompt_len: int) -> Iterator[dict[str, Any]]:
    context_len = prompt_len + NUM_STEPS // 2
    name = f"{bench.name}: decode step, batch {batch_size}, context {context_len}"
    step_ms = median(bench.time_decode_ms(batch_size, prompt_len) for _ in range(3))
    device_ms = median(
        bench.time_device_ms(Batch(decodes=bench.make_sequences(batch_size, context_len, context_len)))
        for _ in range(3)
    )
    num_bytes = bench.weight_bytes() + batch_size * context_len * bench.kv_bytes_per_token
    floor_ms = num_bytes / bench.ceilings["bytes"] * 1e3
    goal = bench.shape.decode_goals.get(batch_size) if prompt_len == 512 else None
    yield {
        "name": name,
        "value": step_ms,
        "unit": "ms",
        "goal": goal and goal * floor_ms,
        "met": goal and step_ms <= goal * floor_ms,
        "floor": floor_ms,
        "ratio": step_ms / floor_ms,
        "device": device_ms,
    }
    gap = 1 - device_ms / step_ms
    met = gap <= HOST_GAP_GOAL
    yield {"name": f"{name}: host gap", "value": gap, "unit": "of the step", "goal": HOST_GAP_GOAL, "met": met}


def prefill_row(bench: Bench, batch_size: int, prompt_len: int) -> dict[str, Any]:
    times_ms, hosts_ms = zip(*[bench.time_prefill_ms(batch_size, prompt_len) for _ in range(6)], strict=True)
    value = median(times_ms[1:])
    floor_ms = bench.prefill_flops(batch_size, prompt_len) / bench.ceilings["flops"] * 1e3
    goal = bench.shape.prefill_goals_ms.get(prompt_len) if batch_size == 1 else None
    if batch_size == 1 and prompt_len in bench.shape.prefill_goals:
        goal = bench.shape.prefill_goals[prompt_len] * floor_ms
    return {
        "name": f"{bench.name}: prefill, {batch_size} x {prompt_len} tokens",
        "value": value,
        "unit": "ms",
        "goal": goal,
        "met": goal and value <= goal,
        "floor": floor_ms,
        "ratio": value / floor_ms,
        "host": median(hosts_ms[1:]),
    }


def mixed_row(bench: Bench, chunk: int, num_decodes: int) -> dict[str, Any]:
    batch = bench.mixed_batch(chunk, num_decodes)
    value = median(bench.time_ahead_ms(batch, NUM_MIXED_STEPS) for _ in range(3))
    device_ms = median(bench.time_device_ms(batch) for _ in range(3))
    floor_ms = bench.mixed_floor_ms(chunk, num_decodes)
    goal = bench.shape.mixed_goals_ms.get((chunk, num_decodes))
    return {
        "name": f"{bench.name}: mixed step, chunk {chunk} at {MIXED_PREFIX_LEN}, {num_decodes} decode rows of"
        f" {MIXED_CONTEXT_LEN}",
        "value": value,
        "unit": "ms",
        "goal": goal,
        "met": goal and value <= goal,
        "floor": floor_ms,
        "ratio": value / floor_ms,
        "device": device_ms,
    }


def penalties_row(bench: Bench) -> dict[str, Any]:
    """All rows share their blocks: so many would not fit, and what the GPU computes is not what is timed."""
    sequences = bench.make_sequences(1, PENALISED_CONTEXT_LEN, PENALISED_CONTEXT_LEN) * PENALISED_ROWS
    plain, penalised = (SamplingParams(max_tokens=2 * NUM_STEPS, repetition_penalty=p) for p in (1.0, 1.1))
    times_ms = []
    for sampling in (plain, penalised):
        rows = []
        for index, sequence in enumerate(sequences):
            request = Request(request_id=index, prompt_token_ids=sequence.request.prompt_token_ids, sampling=sampling)
            rows.append(Sequence(request, [1], PENALISED_CONTEXT_LEN, sequence.block_ids))
        times_ms.append(bench.time_host_ms(rows))
    value = times_ms[1] - times_ms[0]
    return {
        "name": f"{bench.name}: host, penalties of {PENALISED_ROWS} rows of {PENALISED_CONTEXT_LEN}",
        "value": value,
        "unit": "ms",
        "goal": PENALTY_GOAL_MS,
        "met": value <= PENALTY_GOAL_MS,
    }


def profiles(bench: Bench) -> Iterator[tuple[str, Table]]:
    """The kernels of mixed steps and of prefills, means over NUM_MIXED_STEPS in a row, longest first."""
    mixed = bench.mixed_batch(512, 2)
    whole = Batch([PrefillRow(bench.make_sequences(1, 2048, 0)[0], 0, 2048)])
    for name, batch in (("mixed step", mixed), ("prefill of 2,048 tokens", whole)):
        if all(row.end < bench.spec.max_model_len for row in batch.prefills):
            yield f"{bench.name}, {name}", profile(bench, batch)


def profile(bench: Bench, batch: Batch) -> Table:
    commit(batch.sampled, bench.runner.run(batch))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for handle in [bench.runner.launch(batch) for _ in range(NUM_MIXED_STEPS)]:
            handle.token_ids()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    table = Table("kernel", "calls a step", "us a call", "ms a step")
    for event in [event for event in events if event.device_time_total > 0][:25]:
        total_us = event.device_time_total
        calls, step_ms = event.count / NUM_MIXED_STEPS, total_us / NUM_MIXED_STEPS / 1e3
        table.add_row(event.key[:110], f"{calls:g}", f"{total_us / event.count:.1f}", f"{step_ms:.2f}")
    return table


def lasting_matmul_rate() -> float:
    """FLOP/s of the products of `matmul_rate` once the GPU has slowed down to what its power limit allows."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    times_ms = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(50):
            torch.mm(a, b)
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end) / 50)
    rate: float = 2 * 8192**3 / median(times_ms[5:]) * 1e3
    return rate


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("what", "value", "goal", "met", "floor", "ratio", "device", "host", title=title)
    for row in rows:
        numbers = [
            f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("floor", "ratio", "device", "host")
        ]
        goal = "" if row.get("goal") is None else f"{row['goal']:.2f}"
        met = "" if row.get("met") is None else "yes" if row["met"] else "NO"
        table.add_row(row["name"], f"{row['value']:.3f} {row['unit']}", goal, met, *numbers)
    Console(width=150).print(table)


def main(
    output: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}. Default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Decode batch sizes. Default: 1 to 256.")] = None,
    prompt_len: Annotated[list[int] | None, typer.Option(help="Of decodes. Default: 512 and 2,048.")] = None,
    step: Annotated[list[Step] | None, typer.Option(help="What to time. Default: all.")] = None,
    profile: Annotated[bool, typer.Option(help="Print where the time goes.")] = False,
    linear: Annotated[Linears, typer.Option(help="What multiplies by weights in decode steps.")] = Linears.TRITON,
) -> None:
    """Times steps on the current GPU."""
    layers.use_decode_linear = linear == Linears.TRITON
    random.seed(0)
    torch.manual_seed(0)
    ceilings = {"bytes": copy_rate(), "flops": matmul_rate(torch.float16)}
    rows = [
        {"name": "device copy, 2 GiB", "value": ceilings["bytes"] / 1e9, "unit": "GB/s"},
        {"name": "fp16 matmul, 8192 cubed", "value": ceilings["flops"] / 1e12, "unit": "TFLOP/s"},
        {"name": "the same after half a second of it", "value": lasting_matmul_rate() / 1e12, "unit": "TFLOP/s"},
    ]
    batch_sizes = tuple(batch or DECODE_BATCH_SIZES)
    for name in model or SHAPES:
        torch.cuda.empty_cache()
        bench = Bench(name, ceilings, batch_sizes)
        rows += rows_of(bench, step or list(Step), prompt_len or DECODE_PROMPT_LENS)
        for title, table in profiles(bench) if profile else ():
            table.title = title
            Console(width=150).print(table)
        del bench
    show(rows, torch.cuda.get_device_name())
    if output:
        write_results(output, rows)


if __name__ == "__main__":
    typer.run(main)
