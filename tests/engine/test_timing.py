"""An engine that has started knows what its steps take, and its pool is as it was."""

from pathlib import Path

import pytest
import torch

from ensemble.config import Deployment
from ensemble.engine import timing
from ensemble.engine.engine import load_engine
from ensemble.engine.timing import time_steps
from tests.checkpoints import make_tiny_llama


@pytest.mark.parametrize("num_blocks", [3, 400])
def test_steps_of_all_kinds_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
    monkeypatch.setattr(timing, "CPU_BUDGET_S", 100.0)
    block_bytes = 2 * 2 * 2 * 4 * 16 * 4  # layers, key and value, KV heads, tokens, head_dim, float32
    raw = {"path": make_tiny_llama(tmp_path)}
    decode = {"devices": ["cpu"], "kv_cache_bytes": num_blocks * block_bytes}
    deployment = Deployment.parse({"mode": "colocated", "model": raw, "decode": decode, "block_size": 4})
    engine = load_engine(deployment, deployment.decode, torch.device("cpu"))
    steps = time_steps(engine, 64, 16, max_model_len=512)
    shapes = [step.shape for step in steps]
    assert all(step.seconds > 0 for step in steps)
    assert {each.num_prompt_tokens for each in shapes} >= {0, 10 if num_blocks == 3 else 64}
    assert {each.num_rows for each in shapes} == {0, 1, 4, 16}
    assert any(each.num_rows and each.num_prompt_tokens for each in shapes)
    longest = min(512, 4 * num_blocks) - 2
    assert max(each.num_row_keys // max(1, each.num_rows) for each in shapes) == longest
    assert engine.blocks.num_free_blocks == num_blocks
