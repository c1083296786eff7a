"""One replica of one phase under a load, fast: what a placement search tries out by the hundred.

Prefill: prompts in order of arrival, as many in a batch as its budget has room for. Decode: all that has joined, a
token each a step, as long as the KV fits. A pipeline of `pp` places takes a batch every 1/pp of a prompt's time, and
its decode rows are `pp` batches that follow one another.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.scheduling.estimator import StepShape, prompt_keys
from tools.load.records import LONG_OUTPUT
from tools.simulation.costs import StepTimes
from tools.simulation.simulator import Ask

MAX_NUM_SEQS = 256
PLACE_S = 30e-6  # from one place of a pipeline to the next, beside the bytes


@dataclass(frozen=True, slots=True)
class Phase:
    """A replica's degrees, and what its steps take on its tp GPUs of all its places together."""

    tp: int
    pp: int
    steps: StepTimes  # of the whole model on tp GPUs
    num_kv_tokens: int

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp

    @property
    def name(self) -> str:
        return f"tp{self.tp}" + (f" pp{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Of one request, in seconds."""

    joined: float  # when it had room
    longest_gap: float
    itl: float  # what a target judges
    tpot: float


def prefill(asks: Sequence[Ask], phase: Phase, budget: int, cached_share: float = 0.0) -> list[float]:
    """When each prompt is computed. `asks` in the order of arrival; that share of each is found in a prefix cache."""
    ends: list[float] = []
    free_at, index = 0.0, 0
    while index < len(asks):
        now = max(free_at, asks[index].due)
        chunks: list[tuple[int, int]] = []
        num_tokens = 0
        while index < len(asks) and asks[index].due <= now:
            start = int(cached_share * asks[index].prompt_len)
            length = max(1, asks[index].prompt_len - start)
            if chunks and num_tokens + length > budget:
                break
            chunks.append((start, length))
            num_tokens += length
            index += 1
        seconds = prompts_s(phase.steps, num_tokens, sum(prompt_keys(*chunk) for chunk in chunks), budget)
        ends += [now + seconds + PLACE_S * (phase.pp - 1)] * len(chunks)
        free_at = now + seconds / phase.pp
    return ends


def prompts_s(steps: StepTimes, num_tokens: int, num_keys: int, budget: int) -> float:
    """Of as many steps as that many tokens of prompts need; keys are spread evenly over them."""
    num_steps = -(-num_tokens // budget)
    return num_steps * steps.seconds(StepShape(num_tokens // num_steps, num_keys // num_steps, 0, 0))


def decode(joins: Sequence[tuple[float, int, int]], phase: Phase, max_num_seqs: int = MAX_NUM_SEQS) -> list[Decoded]:
    """(when its KV could come, its tokens, output tokens still to come) of each sequence, in order of the first."""
    waiting = deque(sorted(range(len(joins)), key=lambda index: joins[index][0]))
    ends: dict[int, list[int]] = {}  # step |-> who ends with it
    begun: dict[int, tuple[float, int]] = {}  # when it joined, and the step before its first
    found: dict[int, Decoded] = {}
    times: list[float] = []  # of each step
    now, num_rows, num_keys, num_held = 0.0, 0, 0, 0
    while waiting or num_rows:
        if not num_rows:
            now = max(now, joins[waiting[0]][0])
        while waiting and joins[waiting[0]][0] <= now and num_rows < max_num_seqs * phase.pp:
            _, context, left = joins[waiting[0]]
            if num_rows and num_held + context + left > phase.num_kv_tokens:
                break
            index = waiting.popleft()
            begun[index] = (now, len(times))
            if left < 1:
                found[index] = Decoded(now, 0.0, 0.0, 0.0)
                continue
            ends.setdefault(len(times) + left, []).append(index)
            num_rows, num_keys, num_held = num_rows + 1, num_keys + context, num_held + context + left
        if not num_rows:
            continue
        step_s = phase.steps.seconds(StepShape(0, 0, -(-num_rows // phase.pp), num_keys // phase.pp))
        times.append(step_s + PLACE_S * (phase.pp - 1))
        now += times[-1]
        num_keys += num_rows
        for index in ends.pop(len(times), ()):
            joined, first = begun[index]
            _, context, left = joins[index]
            gaps = np.array(times[first:])
            judged = gaps.max() if left < LONG_OUTPUT else np.percentile(gaps, 99)
            found[index] = Decoded(joined, float(gaps.max()), float(judged), float(gaps.mean()))
            num_rows, num_keys, num_held = num_rows - 1, num_keys - context - left, num_held - context - left
    return [found[index] for index in range(len(joins))]
