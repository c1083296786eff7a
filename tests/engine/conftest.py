"""Shared by the tests of steps on a GPU."""

import pytest
from torch import Tensor

from ensemble.engine import model_runner


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits [S, V] of each step that is run from here on, before anything is done to them."""
    logits_of_steps: list[Tensor] = []
    sample_tokens = model_runner.sample_tokens

    def record_and_sample(logits, *args):
        logits_of_steps.append(logits.clone())
        return sample_tokens(logits, *args)

    monkeypatch.setattr(model_runner, "sample_tokens", record_and_sample)
    return logits_of_steps
