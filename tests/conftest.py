"""What every test relies on: where there is no GPU, GPU tests are skipped and Triton kernels can be interpreted.

Property tests try the same examples in every run, however slow the machine is, and new ones
with HYPOTHESIS_PROFILE=explore.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by triton when it is first imported. The launchers still take the torch references on a CPU: only
    # tests/kernels switches them over, test by test.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the cores are shared with the other workers
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders with the longest files come first: workers that take file after file then end together."""
    first = {"tools": 0, "kernels": 1, "models": 2}
    items.sort(key=lambda item: first.get(item.path.parent.name, len(first)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips before any fixture is set up."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default model, downloaded and converted at its first use."""
    from tools.installation.default_model import ensure_default_model

    return ensure_default_model()
