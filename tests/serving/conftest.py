"""Servers that several tests share, and the oracle that they are compared with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble.config import Deployment
from tests.checkpoints import make_tiny_llama
from tools.triton_server import TritonServer

StartServer = Callable[..., TritonServer]


def deploy(path: Path, **changes: Any) -> Deployment:
    """A deployment on the CPU in float64, with small pools; `changes` replace top-level fields or parts of them."""
    raw: dict[str, Any] = {
        "model": {"path": path, "dtype": "float64"},
        "prefill": {"devices": ["cpu"], "kv_cache_bytes": 32 << 20},
        "decode": {"devices": ["cpu"], "kv_cache_bytes": 32 << 20},
    }
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    return Deployment.parse(raw)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA with grouped-query attention."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    with TritonServer(deploy(tiny_llama), log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        yield server


def greedy_by_transformers(path: Path, prompts: list[list[int]], max_tokens: int, dtype: torch.dtype) -> list[list[int]]:
    """The oracle: each prompt's greedy continuation of exactly `max_tokens` tokens, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
