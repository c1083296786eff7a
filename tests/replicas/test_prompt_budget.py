"""Prompts beside sequences: a target of each gap bounds each step; one of the mean (TPOT), them together."""

from math import inf
from types import SimpleNamespace
from typing import cast

from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.prompt_budget import prompt_budget
from ensemble.replicas.prompts import Prompts
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.estimator import StepEstimator, StepShape

TARGET_S = 0.02


def length(settings_keep: bool, *requests: tuple[float | None, bool], last_s: float = 0.011) -> int:
    """Of each request: its target, and whether it is of gaps. A step takes 10 ms and 40 us a token."""
    steps = StepEstimator()
    for chunk in (0, 16, 64, 256, 1024):
        steps.observe(StepShape.of([(0, chunk)], [100] * 4), 1e-2 + 4e-5 * chunk)
    settings = LoopSettings(2048, 2048, 8, itl_target_s=TARGET_S, keeps_gaps=settings_keep)
    prompts = cast(Prompts, SimpleNamespace(has_work=True, next_start=0, num_waiting=1, pace=inf))
    running = [
        Request(
            request_id=number,
            prompt_token_ids=[5],
            sampling=SamplingParams(),
            itl_target_s=target_s,
            keeps_gaps=keeps,
        )
        for number, (target_s, keeps) in enumerate(requests)
    ]
    return prompt_budget(settings, steps, prompts, 100.0, len(running), running, [last_s] * 31, 1, fills_tiles=False)


def test_who_has_no_target_of_its_own_has_the_deployments_and_its_kind() -> None:
    by_gaps = length(True, (None, False), (None, False))
    assert by_gaps < 1000
    assert by_gaps == length(False, (None, False), (TARGET_S, True))
    assert length(False, (None, False), (None, False)) == length(False, (0.05, False), (TARGET_S, False)) == 2048
    assert length(True, (0.05, False)) == 2048  # its own, of the mean


def test_steps_that_took_all_leave_nothing() -> None:
    assert length(False, (None, False), last_s=TARGET_S) == length(True, (None, False))
