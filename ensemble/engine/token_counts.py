"""For which token counts the graphs of steps with prompts are captured: those at which the model's products are fast.

A library's time over the number of rows is a staircase with holes. cuBLAS on an H100, the products of LLaMA-2-13B:

    rows    256    264    288    320    512    514    528    544    640
    ms     11.2   11.7   12.9   14.3   20.2   23.2   18.8   21.3   26.3

A step of 514 tokens padded to 528 takes four fifths of its own time. Where the holes are depends on the shapes, the
library and the GPU, so they are measured, once, when a replica starts.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch

_MIN_GAIN = 0.02  # of the time of the next larger count; less is not worth a graph
_ROUNDS = 3
_PAUSE_CYCLES = 1_000_000  # of the GPU: the host launches meanwhile, and no count finds it slowed down by those before


def candidates(max_num_tokens: int) -> list[int]:
    """Counts to measure, up to and with `max_num_tokens`."""
    counts = [16, *range(32, 640, 8), *range(640, 1280, 32), *range(1280, max_num_tokens, 64)]
    return [count for count in counts if count < max_num_tokens] + [max_num_tokens]


def worth_capturing(counts: Sequence[int], times: Sequence[float]) -> list[int]:
    """Of ascending counts and their times those, ascending, that are faster than all larger ones; always the largest.

    A step then pads to the next larger of them, the fastest count that holds it, to within _MIN_GAIN.
    """
    kept, best = [counts[-1]], times[-1]
    for count, time in zip(reversed(counts[:-1]), reversed(times[:-1]), strict=True):
        if time < best * (1 - _MIN_GAIN):
            kept.append(count)
            best = time
    return kept[::-1]


def measure(run: Callable[[int, int], object], counts: Sequence[int]) -> list[float]:
    """Median time on the current GPU, in milliseconds, of `run(round, count)` for each count."""
    times: list[list[float]] = [[] for _ in counts]
    for round_ in range(_ROUNDS):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in counts]
        for count, (start, end) in zip(counts, events, strict=True):
            torch.cuda._sleep(_PAUSE_CYCLES)
            start.record()
            run(round_, count)
            end.record()
        torch.cuda.synchronize()
        for index, (start, end) in enumerate(events):
            times[index].append(start.elapsed_time(end))
    return [median(each) for each in times]
