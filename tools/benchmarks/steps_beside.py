"""Decode steps of LLaMA-2-7B's shape on the current GPU, alone and with copies under way all the time, by turns."""

import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, Protocol

import torch

from ensemble.cache.kv_pool import KVLayout
from ensemble.engine.batch import Batch
from tools.benchmarks.engine_bench import NUM_STEPS, Bench, commit

MODEL, BATCH_SIZES = "LLaMA-2-7B", (1, 32, 64)
PROMPT_LEN = 512
ROUNDS = 7
STEP_GOAL = 1.10


class Churn(Protocol):
    """Copies of blocks that no running sequence has."""

    num_blocks: int  # copied so far

    def go_on(self) -> None:
        """Before each step: so that a copy is under way during it."""
        ...

    def end(self) -> None: ...


MakeChurn = Callable[[list[int]], Churn]  # of blocks of the pool that are nobody's


def make_bench() -> Bench:
    return Bench(MODEL, {}, BATCH_SIZES)


def layout_of(bench: Bench) -> KVLayout:
    spec = bench.spec
    return KVLayout(
        spec.num_layers, spec.num_kv_heads, bench.runner.block_size, spec.head_dim, bench.runner.kv_pool.dtype
    )


def step_rows(bench: Bench, copies: str, make_churn: MakeChurn) -> Iterator[dict[str, Any]]:
    """A row for each batch size. The host's work for the copies is part of the step."""
    block_bytes = layout_of(bench).block_bytes
    for batch_size in bench.batch_sizes:
        alone, beside, num_blocks, copying_s = [], [], 0, 0.0
        for _ in range(ROUNDS):
            alone.append(_step_ms(bench, batch_size, None)[0])
            milliseconds, num_copied = _step_ms(bench, batch_size, make_churn)
            beside.append(milliseconds)
            num_blocks += num_copied
            copying_s += milliseconds * NUM_STEPS / 1e3
        ratio = median(beside) / median(alone)
        context_len = PROMPT_LEN + NUM_STEPS // 2
        yield {
            "name": f"{bench.name}: decode step beside {copies}, batch {batch_size}, context {context_len}",
            "value": round(ratio, 3),
            "unit": "of a step alone",
            "goal": STEP_GOAL,
            "met": ratio <= STEP_GOAL,
            "alone_ms": round(median(alone), 3),
            "beside_ms": round(median(beside), 3),
            "copied_GBps": round(num_blocks * block_bytes / copying_s / 1e9, 1),
        }


def _step_ms(bench: Bench, batch_size: int, make_churn: MakeChurn | None) -> tuple[float, int]:
    """Milliseconds of a step, each launched before the tokens of the one before are read; blocks copied meanwhile."""
    sequences = bench.make_sequences(batch_size, PROMPT_LEN, PROMPT_LEN)
    running = {block_id for sequence in sequences for block_id in sequence.block_ids}
    idle = [block_id for block_id in range(bench.num_blocks) if block_id not in running]
    random.shuffle(idle)
    churn = make_churn(idle) if make_churn is not None else None
    before = bench.runner.launch(Batch(decodes=sequences))
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        if churn is not None:
            churn.go_on()
        handle = bench.runner.launch(Batch(decodes=sequences))
        commit(sequences, before.token_ids())
        before = handle
    before.token_ids()
    milliseconds = (time.perf_counter() - start) / NUM_STEPS * 1e3
    if churn is None:
        return milliseconds, 0
    num_blocks = churn.num_blocks
    churn.end()
    torch.cuda.synchronize()
    return milliseconds, num_blocks
