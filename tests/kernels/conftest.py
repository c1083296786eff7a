"""The kernel tests run the Triton kernels themselves: compiled on a GPU, in Triton's interpreter without one."""

import gc

import pytest
import torch

from kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpret", DEVICE == "cpu")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def free_gpu_memory() -> None:
    """Gives back what earlier tests left in torch's cache: for tests that take gigabytes."""
    gc.collect()
    torch.cuda.empty_cache()


# bf16 arithmetic in the interpreter works on raw bits (triton issue 11584), so bf16 is tested on a GPU alone.
@pytest.fixture(params=[torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
