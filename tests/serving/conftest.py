"""Servers that several tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny_llama
from tests.serving.deployments import deploy
from tools.triton_server import TritonServer


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
