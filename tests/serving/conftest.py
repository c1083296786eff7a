"""Servers that several tests share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.serving.run_dir import RUN_DIR_VARIABLE
from tests.checkpoints import make_tiny_llama
from tests.serving.deployments import deploy
from tools.server.triton_server import TritonServer


@pytest.fixture(scope="session", autouse=True)
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what these tests run in their own process."""
    path = tmp_path_factory.mktemp("run")
    os.environ[RUN_DIR_VARIABLE] = str(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA with grouped-query attention."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def roomy_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For requests that have to be still under way when a test meddles, also on a machine so busy that 500 tokens
    are through before the test sees the first."""
    return make_tiny_llama(tmp_path_factory.mktemp("roomy-llama"), max_position_embeddings=8192)


@pytest.fixture(scope="session")
def tiny_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    with TritonServer(deploy(tiny_llama), log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        yield server


@pytest.fixture(autouse=True)
def shared_server_serves_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that ends the server that others use, or finds it ended, fails with the reason; the next ones have it
    again."""
    if "tiny_server" not in request.fixturenames:
        yield
        return
    server: TritonServer = request.getfixturevalue("tiny_server")
    before = server.poll()
    yield
    if (reason := server.poll()) is not None:
        lines = server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        free = shutil.disk_usage("/dev/shm").free
        server.restart()
        server.wait_ready(timeout_s=120)
        told = f"before the test: {before}; after it: {reason}; /dev/shm had {free >> 20} MiB left; its log ends:"
        pytest.fail("\n".join([told, *lines[-40:]]))
