"""Times the engine's steps on one GPU, with dummy weights of published shapes, beside what the hardware allows.

python -m tools.benchmarks.engine --output docs/results/engine.json

decode   a batch of prompts of 512 (2,048) tokens, mean over the next 64 steps; each step is launched before the
         tokens of the one before it are read, as the engine does. Floor: the weights once (the output projection
         included, the input embedding excluded) and the KV of every sequence, over the measured copy rate.
device   the same steps with the launches already waiting: what of the step is the GPU's. The rest is the host gap.
prefill  from the batch to the sampled tokens on the host. Floor: the model's FLOPs over the measured matmul rate.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from ensemble.models.spec import ModelSpec, load_model_spec
from ensemble.request import Request, SamplingParams, Sequence
from tools.benchmarks.kernels import copy_rate, matmul_rate
from tools.benchmarks.results import write_results

NUM_STEPS = 64
MAX_NUM_BATCHED_TOKENS = 8192
RESERVE_BYTES = 6 << 30  # activations of the largest prefill, graphs, workspaces
HOST_GAP_GOAL = 0.03
DECODE_BATCH_SIZES = (1, 8, 32, 64, 128, 256)
DECODE_PROMPT_LENS = (512, 2048)
PREFILLS = ((1, 512), (1, 1024), (1, 2048), (8, 512), (4, 2048))

LLAMA_2 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 4096}
OPT = {"architectures": ["OPTForCausalLM"], "vocab_size": 50272, "max_position_embeddings": 2048}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A published model's config.json, and the goals of issue B: decode by batch size as a multiple of the floor at a
    mean context of 544, prefill of one prompt by its length in milliseconds.
    """

    config: dict[str, Any]
    decode_goals: dict[int, float]
    prefill_goals_ms: dict[int, float]


SHAPES = {
    "LLaMA-2-7B": Shape(
        config=LLAMA_2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-5,
        },
        decode_goals={1: 1.18, 8: 1.18, 32: 1.14, 64: 1.12, 128: 1.10},
        prefill_goals_ms={512: 14, 1024: 24, 2048: 46},
    ),
    "LLaMA-2-13B": Shape(
        config=LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "rms_norm_eps": 1e-5,
        },
        decode_goals={},
        prefill_goals_ms={},
    ),
    "OPT-13B": Shape(
        config=OPT | {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
        decode_goals={1: 1.14, 8: 1.14, 32: 1.11, 64: 1.09},
        prefill_goals_ms={512: 26, 1024: 46},
    ),
}


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

    def rows(self, prompt_lens: Iterable[int], prefills: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        yield {"name": f"{self.name}: start to ready", "value": self.ready_s, "unit": "s"}
        for prompt_len in prompt_lens:
            for batch_size in self.batch_sizes:
                fits = self.blocks_for(prompt_len + NUM_STEPS) * batch_size <= self.num_blocks
                if fits and prompt_len + NUM_STEPS < self.spec.max_model_len:
                    yield from self.decode_rows(batch_size, prompt_len)
        for batch_size, prompt_len in prefills:
            if prompt_len < self.spec.max_model_len:
                yield self.prefill_row(batch_size, prompt_len)

    def decode_rows(self, batch_size: int, prompt_len: int) -> Iterator[dict[str, Any]]:
        context_len = prompt_len + NUM_STEPS // 2
        name = f"{self.name}: decode step, batch {batch_size}, context {context_len}"
        step_ms = median(self.time_decode_ms(batch_size, prompt_len) for _ in range(3))
        device_ms = median(self.time_device_ms(batch_size, context_len) for _ in range(3))
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
        times_ms = [self.time_prefill_ms(batch_size, prompt_len) for _ in range(6)]
        value = median(times_ms[1:])
        floor_ms = self.prefill_flops(batch_size, prompt_len) / self.ceilings["flops"] * 1e3
        goal = self.shape.prefill_goals_ms.get(prompt_len) if batch_size == 1 else None
        return {
            "name": f"{self.name}: prefill, {batch_size} x {prompt_len} tokens",
            "value": value,
            "unit": "ms",
            "goal": goal,
            "met": goal and value <= goal,
            "floor": floor_ms,
            "ratio": value / floor_ms,
        }

    def time_decode_ms(self, batch_size: int, prompt_len: int) -> float:
        sequences = self.make_sequences(batch_size, prompt_len, prompt_len)
        commit(sequences, self.runner.run(Batch(decodes=sequences)))
        before: StepHandle | None = None
        start = time.perf_counter()
        for _ in range(NUM_STEPS):
            handle = self.runner.launch(Batch(decodes=sequences))
            if before is not None:
                commit(sequences, before.token_ids())
            before = handle
        assert before is not None
        before.token_ids()
        return (time.perf_counter() - start) / NUM_STEPS * 1e3

    def time_device_ms(self, batch_size: int, context_len: int) -> float:
        """Two steps whose launches wait behind a pause of the GPU's."""
        sequences = self.make_sequences(batch_size, context_len, context_len)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000_000)
        start.record()
        first, second = (self.runner.launch(Batch(decodes=sequences)) for _ in range(2))
        end.record()
        for handle in (first, second):
            handle.token_ids()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms / 2

    def time_prefill_ms(self, batch_size: int, prompt_len: int) -> float:
        sequences = self.make_sequences(batch_size, prompt_len, 0)
        start = time.perf_counter()
        self.runner.run(Batch(prefills=[PrefillRow(sequence, 0, prompt_len) for sequence in sequences]))
        return (time.perf_counter() - start) * 1e3

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
        total = sum(weight.nbytes for name, weight in self.model.named_weights() if "embed" not in name)
        return total + (self.model.lm_head.weight.nbytes if self.spec.tie_word_embeddings else 0)

    def prefill_flops(self, batch_size: int, prompt_len: int) -> float:
        """Matrix products and the causal half of attention; the output projection for one token of each prompt."""
        head = self.model.lm_head.weight.numel()
        weights = sum(linear.weight.numel() for linear in self.model.linears()) - head
        attention = 2 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * prompt_len
        return batch_size * (prompt_len * (2 * weights + attention) + 2 * head)


def commit(sequences: list[Sequence], token_ids: list[int]) -> None:
    for sequence, token_id in zip(sequences, token_ids, strict=True):
        sequence.append(token_id, frozenset())


def load_spec(config: dict[str, Any]) -> ModelSpec:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config))
        return load_model_spec(directory)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("what", "value", "goal", "met", "floor", "ratio", "device", title=title)
    for row in rows:
        numbers = [f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("floor", "ratio", "device")]
        goal = "" if row.get("goal") is None else f"{row['goal']:.2f}"
        met = "" if row.get("met") is None else "yes" if row["met"] else "NO"
        table.add_row(row["name"], f"{row['value']:.3f} {row['unit']}", goal, met, *numbers)
    Console(width=150).print(table)


def main(
    output: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}. Default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Decode batch sizes. Default: 1 to 256.")] = None,
    prompt_len: Annotated[list[int] | None, typer.Option(help="Of decodes. Default: 512 and 2,048.")] = None,
    prefill: Annotated[bool, typer.Option(help="Time prefills too.")] = True,
    linear: Annotated[Linears, typer.Option(help="What multiplies by weights in decode steps.")] = Linears.TRITON,
) -> None:
    """Times decode and prefill steps on the current GPU."""
    layers.use_decode_linear = linear == Linears.TRITON
    random.seed(0)
    torch.manual_seed(0)
    ceilings = {"bytes": copy_rate(), "flops": matmul_rate(torch.float16)}
    rows = [
        {"name": "device copy, 2 GiB", "value": ceilings["bytes"] / 1e9, "unit": "GB/s"},
        {"name": "fp16 matmul, 8192 cubed", "value": ceilings["flops"] / 1e12, "unit": "TFLOP/s"},
    ]
    batch_sizes = tuple(batch or DECODE_BATCH_SIZES)
    for name in model or SHAPES:
        torch.cuda.empty_cache()
        rows += Bench(name, ceilings, batch_sizes).rows(prompt_len or DECODE_PROMPT_LENS, PREFILLS if prefill else ())
    show(rows, torch.cuda.get_device_name())
    if output:
        write_results(output, rows)


if __name__ == "__main__":
    typer.run(main)
