"""What steps of a fresh engine take: the first samples of its estimator."""

import time
from collections.abc import Iterator
from itertools import count

from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.engine import Engine
from ensemble.request import Request, SamplingParams, Sequence
from ensemble.scheduling.estimator import StepShape, TimedStep

CPU_BUDGET_S, GPU_BUDGET_S = 0.2, 3.0
_TWICE = 2  # the first of a kind may load or allocate something


def time_steps(
    engine: Engine, max_num_prompt_tokens: int, max_num_seqs: int, max_model_len: int, budget_s: float | None = None
) -> list[TimedStep]:
    """Runs steps of all kinds, the small ones first, as long as the budget lasts. Overwrites what is in the pool.

    A pipeline's are those of one place: what lies between the ends of two steps when all places have one.
    To be called in every rank of the engine's group, which all run the same steps.
    """
    deadline = time.monotonic() + (budget_s or (GPU_BUDGET_S if engine.pool.tensor.is_cuda else CPU_BUDGET_S))
    longest = max(1, min(max_model_len, engine.pool.num_blocks * engine.pool.layout.block_size) - 2)
    num_places = engine.group.pipeline.size  # a step alone passes them one after the other
    steps: list[TimedStep] = []
    for chunk, rows in _kinds(max_num_prompt_tokens, max_num_seqs, longest):
        shape = StepShape.of([chunk] if chunk[1] else [], rows)
        for _ in range(_TWICE):
            batch = _batch(engine, chunk, rows)
            start = time.monotonic()
            engine.step(batch)
            seconds = time.monotonic() - start
            steps.append(TimedStep(shape, seconds / num_places))
        if not engine.group.smallest(int(time.monotonic() + _TWICE * seconds <= deadline)):
            break
    return steps


def _kinds(max_num_tokens: int, max_num_seqs: int, longest: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """(start, length) of a chunk, and the lengths of the sequences beside it."""
    short = min(32, longest)
    for size in (1 << power for power in range(0, max(max_num_tokens, max_num_seqs).bit_length(), 2)):
        length = min(size, longest)
        if size <= max_num_seqs:
            yield (0, 0), [short] * size
            if size * longest <= 1 << 18:
                yield (0, 0), [longest] * size
        if 16 <= size <= max_num_tokens:
            yield (0, length), []
            if longest - length > length:
                yield (longest - length, length), []
            yield (0, length), [short] * min(size, max_num_seqs)


def _batch(engine: Engine, chunk: tuple[int, int], rows: list[int]) -> Batch:
    """Of sequences that have their blocks all over the pool: reading one block again and again would be too fast."""
    num_blocks, block_size = engine.pool.num_blocks, engine.pool.layout.block_size
    ids = count()

    def sequence(prompt_len: int, output_token_ids: list[int]) -> Sequence:
        number = next(ids)
        sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        request = Request(request_id=-1 - number, prompt_token_ids=[0] * prompt_len, sampling=sampling)
        needed = prompt_len // block_size + 1
        block_ids = [(number * needed + index) % num_blocks for index in range(needed)]
        return Sequence(request, output_token_ids, block_ids=block_ids)

    start, length = chunk
    prefills = [PrefillRow(sequence(start + length, []), start, length)] if length else []
    return Batch(prefills, [sequence(max(1, context_len - 1), [0]) for context_len in rows])
