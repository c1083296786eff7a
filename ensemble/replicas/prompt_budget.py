"""How many tokens of prompts the next step takes."""

from collections.abc import Collection, Iterable

from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.prompts import Prompts
from ensemble.request import Request
from ensemble.scheduling.estimator import StepEstimator, StepShape
from ensemble.scheduling.placement import chunk_beside, smallest, spare_s

# On a GPU a step's products take whole tiles of tokens: of LLaMA-2-13B on an H100 a chunk of 254 beside 2 rows takes
# 15.0 ms, one of 256 takes 16.3.
STEP_TILE = 64


def whole_tiles(num_tokens: int, num_rows: int) -> int:
    """So many tokens of prompts, or fewer, that they fill tiles with the rows; at least half of them, so that prompts
    get on."""
    num_beyond = (num_tokens + num_rows) % STEP_TILE
    return num_tokens - num_beyond if 2 * num_beyond <= num_tokens else num_tokens


def prompt_budget(
    settings: LoopSettings,
    estimator: StepEstimator,
    prompts: Prompts,
    mean_context_len: float,  # of the sequences
    num_rows: int,  # sequences that decode
    running: Iterable[Request],  # theirs
    last_s: Collection[float],  # seconds of the last steps with sequences
    num_parts: int,  # of a pipeline: a sequence is in one of so many steps, and waits for the others
    *,
    fills_tiles: bool,
) -> int:
    """Beside running sequences as many as their targets allow."""
    if not num_rows or settings.batching == "prefill-first":
        return settings.max_num_prompt_tokens
    if not prompts.has_work:
        return settings.max_num_prompt_tokens_beside
    num_rows = -(-num_rows // num_parts)
    requests = list(running)
    target_s = smallest([each.itl_target_s for each in requests], settings.itl_target_s)
    keeps_gaps = any(settings.keeps_gaps if each.itl_target_s is None else each.keeps_gaps for each in requests)
    step_target_s = None if target_s is None else target_s / num_parts
    num_tokens = chunk_beside(
        estimator,
        StepShape(0, 0, num_rows, round(num_rows * mean_context_len)),
        prompts.next_start,
        step_target_s,
        settings.max_num_prompt_tokens_beside,
        prompts.num_waiting,
        adapts=settings.adapts,
        pace=prompts.pace,
        spare_s=0.0 if step_target_s is None or keeps_gaps else spare_s(last_s, step_target_s),
    )
    return whole_tiles(num_tokens, num_rows) if fills_tiles else num_tokens
