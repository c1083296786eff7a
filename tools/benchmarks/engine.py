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
import time
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ensemble.config import GPU_BLOCK_SIZE, ModelConfig
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.model_runner import ModelRunner, StepHandle, load_model
from ensemble.models import layers
from ensemble.request import Request, SamplingParams, Sequence
from tools.benchmarks.engine_shapes import SHAPES, load_spec
from tools.benchmarks.kernels import copy_rate, matmul_rate
from tools.benchmarks.results import write_results

NUM_STEPS = 64
NUM_MIXED_STEPS = 16
MAX_NUM_BATCHED_TOKENS = 8192
RESERVE_BYTES = 6 << 30  # activations of the largest prefill, graphs, workspaces
HOST_GAP_GOAL = 0.03
DECODE_BATCH_SIZES = (1, 8, 32, 64, 128, 256)
DECODE_PROMPT_LENS = (512, 2048)
PREFILLS = ((1, 512), (1, 1024), (1, 2048), (8, 512), (4, 2048))
MIXED = ((256, 2), (256, 8), (512, 2), (512, 8), (254, 2), (248, 8))  # tokens of the chunk, decode rows
MIXED_PREFIX_LEN, MIXED_CONTEXT_LEN = 1024, 2000  # before the chunk, and of each decode row
PENALISED_ROWS, PENALISED_CONTEXT_LEN, PENALTY_GOAL_MS = 256, 4000, 1.0


class Step(str, Enum):
    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"
    HOST = "host"


class Linears(str, Enum):
    TRITON = "triton"
    CUBLAS = "cublas"


class Bench:
    """One model on the current GPU, with as large a KV pool as fits."""

    def __init__(self, name: str, ceilings: dict[str, float], batch_sizes: tuple[int, ...]) -> None:
        self.name, self.shape, self.ceilings, self.batch_sizes = name, SHAPES[name], ceilings, batch_sizes
        device = torch.device("cuda", torch.cuda.current_device())
        start = time.perf_counter()
        self.spec = load_spec(self.shape.config)
        config = ModelConfig(path=self.spec.path, load_format="dummy")
        self.model = load_model(self.spec, config, device, torch.float16)
        block_shape = (self.spec.num_layers, 2, self.spec.num_kv_heads, GPU_BLOCK_SIZE, self.spec.head_dim)
        self.kv_bytes_per_token = 2 * self.spec.num_layers * 2 * self.spec.num_kv_heads * self.spec.head_dim
        free_bytes = torch.cuda.mem_get_info()[0] - RESERVE_BYTES
        self.num_blocks = free_bytes // (self.kv_bytes_per_token * GPU_BLOCK_SIZE)
        kv_pool = torch.empty((self.num_blocks, *block_shape), dtype=torch.float16, device=device).normal_()
        self.runner = ModelRunner(self.model, kv_pool, GPU_BLOCK_SIZE)
        max_num_seqs = min(max(batch_sizes), self.num_blocks * GPU_BLOCK_SIZE // (512 + NUM_STEPS))
        self.runner.warm_up(max_num_seqs, MAX_NUM_BATCHED_TOKENS, self.spec.max_model_len)
        torch.cuda.synchronize()
        self.ready_s = time.perf_counter() - start

    def rows(self, steps: Iterable[Step], prompt_lens: Iterable[int]) -> Iterator[dict[str, Any]]:
        yield {"name": f"{self.name}: start to ready", "value": self.ready_s, "unit": "s"}
        for step in steps:
            if step == Step.DECODE:
                for prompt_len in prompt_lens:
                    for batch_size in self.batch_sizes:
                        if self.fits(batch_size, prompt_len + NUM_STEPS):
                            yield from self.decode_rows(batch_size, prompt_len)
            elif step == Step.PREFILL:
                for batch_size, prompt_len in PREFILLS:
                    if self.fits(batch_size, prompt_len):
                        yield self.prefill_row(batch_size, prompt_len)
            elif step == Step.MIXED:
                for chunk, num_decodes in MIXED:
                    if self.fits(num_decodes + 1, MIXED_CONTEXT_LEN + NUM_MIXED_STEPS):
                        yield self.mixed_row(chunk, num_decodes)
            elif self.spec.max_model_len > PENALISED_CONTEXT_LEN:
                yield self.penalties_row()

    def fits(self, batch_size: int, num_tokens: int) -> bool:
        return num_tokens < self.spec.max_model_len and self.blocks_for(num_tokens) * batch_size <= self.num_blocks

    def decode_rows(self, batch_size: int, prompt_len: int) -> Iterator[dict[str, Any]]:
        context_len = prompt_len + NUM_STEPS // 2
        name = f"{self.name}: decode step, batch {batch_size}, context {context_len}"
        step_ms = median(self.time_decode_ms(batch_size, prompt_len) for _ in range(3))
        device_ms = median(
            self.time_device_ms(Batch(decodes=self.make_sequences(batch_size, context_len, context_len)))
            for _ in range(3)
        )
        num_bytes = self.weight_bytes() + batch_size * context_len * self.kv_bytes_per_token
        floor_ms = num_bytes / self.ceilings["bytes"] * 1e3
        goal = self.shape.decode_goals.get(batch_size) if prompt_len == 512 else None
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

    def prefill_row(self, batch_size: int, prompt_len: int) -> dict[str, Any]:
        times_ms, hosts_ms = zip(*[self.time_prefill_ms(batch_size, prompt_len) for _ in range(6)], strict=True)
        value = median(times_ms[1:])
        floor_ms = self.prefill_flops(batch_size, prompt_len) / self.ceilings["flops"] * 1e3
        goal = self.shape.prefill_goals_ms.get(prompt_len) if batch_size == 1 else None
        if batch_size == 1 and prompt_len in self.shape.prefill_goals:
            goal = self.shape.prefill_goals[prompt_len] * floor_ms
        return {
            "name": f"{self.name}: prefill, {batch_size} x {prompt_len} tokens",
            "value": value,
            "unit": "ms",
            "goal": goal,
            "met": goal and value <= goal,
            "floor": floor_ms,
            "ratio": value / floor_ms,
            "host": median(hosts_ms[1:]),
        }

    def mixed_row(self, chunk: int, num_decodes: int) -> dict[str, Any]:
        batch = self.mixed_batch(chunk, num_decodes)
        value = median(self.time_ahead_ms(batch, NUM_MIXED_STEPS) for _ in range(3))
        device_ms = median(self.time_device_ms(batch) for _ in range(3))
        floor_ms = self.mixed_floor_ms(chunk, num_decodes)
        goal = self.shape.mixed_goals_ms.get((chunk, num_decodes))
        return {
            "name": f"{self.name}: mixed step, chunk {chunk} at {MIXED_PREFIX_LEN}, {num_decodes} decode rows of"
            f" {MIXED_CONTEXT_LEN}",
            "value": value,
            "unit": "ms",
            "goal": goal,
            "met": goal and value <= goal,
            "floor": floor_ms,
            "ratio": value / floor_ms,
            "device": device_ms,
        }

    def mixed_batch(self, chunk: int, num_decodes: int) -> Batch:
        """A chunk that does not end its prompt, beside decode rows."""
        sequences = self.make_sequences(num_decodes + 1, MIXED_CONTEXT_LEN, MIXED_CONTEXT_LEN)
        sequences[0].output_token_ids.clear()
        return Batch([PrefillRow(sequences[0], MIXED_PREFIX_LEN, chunk)], sequences[1:])

    def penalties_row(self) -> dict[str, Any]:
        """All rows share their blocks: so many would not fit, and what the GPU computes is not what is timed."""
        sequences = self.make_sequences(1, PENALISED_CONTEXT_LEN, PENALISED_CONTEXT_LEN) * PENALISED_ROWS
        plain, penalised = (SamplingParams(max_tokens=2 * NUM_STEPS, repetition_penalty=p) for p in (1.0, 1.1))
        times_ms = []
        for sampling in (plain, penalised):
            rows = []
            for index, sequence in enumerate(sequences):
                request = Request(
                    request_id=index, prompt_token_ids=sequence.request.prompt_token_ids, sampling=sampling
                )
                rows.append(Sequence(request, [1], PENALISED_CONTEXT_LEN, sequence.block_ids))
            times_ms.append(self.time_host_ms(rows))
        value = times_ms[1] - times_ms[0]
        return {
            "name": f"{self.name}: host, penalties of {PENALISED_ROWS} rows of {PENALISED_CONTEXT_LEN}",
            "value": value,
            "unit": "ms",
            "goal": PENALTY_GOAL_MS,
            "met": value <= PENALTY_GOAL_MS,
        }

    def time_host_ms(self, sequences: list[Sequence]) -> float:
        """Median time of launching a decode step, once it has run a few times; each step has run before the next."""
        times_ms = []
        for _ in range(8):
            start = time.perf_counter()
            handle = self.runner.launch(Batch(decodes=sequences))
            times_ms.append((time.perf_counter() - start) * 1e3)
            commit(sequences, handle.token_ids())
        return median(times_ms[3:])

    def time_decode_ms(self, batch_size: int, prompt_len: int) -> float:
        return self.time_ahead_ms(Batch(decodes=self.make_sequences(batch_size, prompt_len, prompt_len)), NUM_STEPS)

    def time_ahead_ms(self, batch: Batch, num_steps: int) -> float:
        """Mean over steps of the same rows, each launched before the tokens of the one before it are read."""
        commit(batch.sampled, self.runner.run(batch))
        before: StepHandle | None = None
        start = time.perf_counter()
        for _ in range(num_steps):
            handle = self.runner.launch(batch)
            if before is not None:
                commit(batch.sampled, before.token_ids())
            before = handle
        assert before is not None
        before.token_ids()
        return (time.perf_counter() - start) / num_steps * 1e3

    def time_device_ms(self, batch: Batch) -> float:
        """Two steps whose launches wait behind a pause of the GPU's."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)
        start.record()
        first, second = (self.runner.launch(batch) for _ in range(2))
        end.record()
        for handle in (first, second):
            handle.token_ids()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms / 2

    def time_prefill_ms(self, batch_size: int, prompt_len: int) -> tuple[float, float]:
        """The whole step, and the host's part of it: until it has been launched."""
        sequences = self.make_sequences(batch_size, prompt_len, 0)
        start = time.perf_counter()
        handle = self.runner.launch(Batch(prefills=[PrefillRow(sequence, 0, prompt_len) for sequence in sequences]))
        launched = time.perf_counter()
        handle.token_ids()
        return (time.perf_counter() - start) * 1e3, (launched - start) * 1e3

    def make_sequences(self, batch_size: int, prompt_len: int, num_computed_tokens: int) -> list[Sequence]:
        """Sequences over shuffled blocks; those that are prefilled have one token of output."""
        blocks = random.sample(range(self.num_blocks), batch_size * self.blocks_for(prompt_len + NUM_STEPS))
        sampling = SamplingParams(max_tokens=2 * NUM_STEPS, temperature=0)
        sequences = []
        for index in range(batch_size):
            prompt = random.choices(range(self.spec.vocab_size), k=prompt_len)
            request = Request(request_id=index, prompt_token_ids=prompt, sampling=sampling)
            output = [1] if num_computed_tokens else []
            block_ids = blocks[index::batch_size]
            sequences.append(Sequence(request, output, num_computed_tokens, block_ids))
        return sequences

    def blocks_for(self, num_tokens: int) -> int:
        return -(-(num_tokens + 2) // GPU_BLOCK_SIZE)

    def weight_bytes(self) -> int:
        """Of all weights but the tables that a step takes only a few rows from."""
        total = sum(each.tensor.nbytes for each in self.model.named_weights() if "embed" not in each.name)
        return total + (self.model.lm_head.weight.nbytes if self.spec.tie_word_embeddings else 0)

    def prefill_flops(self, batch_size: int, prompt_len: int) -> float:
        """Matrix products and the causal half of attention; the output projection for one token of each prompt."""
        head = self.model.lm_head.weight.numel()
        weights = sum(linear.weight.numel() for linear in self.model.linears()) - head
        attention = 2 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * prompt_len
        return batch_size * (prompt_len * (2 * weights + attention) + 2 * head)

    def mixed_floor_ms(self, chunk: int, num_decodes: int) -> float:
        head = self.model.lm_head.weight.numel()
        weights = sum(linear.weight.numel() for linear in self.model.linears()) - head
        products = 2 * weights * (chunk + num_decodes) + 2 * head * num_decodes
        context_lens = MIXED_PREFIX_LEN + num_decodes * MIXED_CONTEXT_LEN
        pairs = chunk * (MIXED_PREFIX_LEN + chunk / 2) + num_decodes * MIXED_CONTEXT_LEN
        attention = 4 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * pairs
        byte_rate, flop_rate = self.ceilings["bytes"], self.ceilings["flops"]
        seconds = max(self.weight_bytes() / byte_rate, products / flop_rate)
        return (seconds + context_lens * self.kv_bytes_per_token / byte_rate + attention / flop_rate) * 1e3

    def profiles(self) -> Iterator[tuple[str, Table]]:
        """The kernels of mixed steps and of prefills, means over NUM_MIXED_STEPS in a row, longest first."""
        mixed = self.mixed_batch(512, 2)
        whole = Batch([PrefillRow(self.make_sequences(1, 2048, 0)[0], 0, 2048)])
        for name, batch in (("mixed step", mixed), ("prefill of 2,048 tokens", whole)):
            if all(row.end < self.spec.max_model_len for row in batch.prefills):
                yield f"{self.name}, {name}", self.profile(batch)

    def profile(self, batch: Batch) -> Table:
        commit(batch.sampled, self.runner.run(batch))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for handle in [self.runner.launch(batch) for _ in range(NUM_MIXED_STEPS)]:
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


def commit(sequences: list[Sequence], token_ids: list[int]) -> None:
    for sequence, token_id in zip(sequences, token_ids, strict=True):
        sequence.append(token_id, frozenset())


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
        rows += bench.rows(step or list(Step), prompt_len or DECODE_PROMPT_LENS)
        for title, table in bench.profiles() if profile else ():
            table.title = title
            Console(width=150).print(table)
        del bench
    show(rows, torch.cuda.get_device_name())
    if output:
        write_results(output, rows)


if __name__ == "__main__":
    typer.run(main)
