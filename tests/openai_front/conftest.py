"""A server of a tiny model with a chat template, and OpenAI's own client of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.checkpoints import make_tiny_llama
from tests.serving.deployments import deploy
from tools.server.ports import free_ports
from tools.server.triton_server import TritonServer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content or message.tool_calls[0].function.name }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ closing }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_llama(tmp_path_factory.mktemp("openai") / "tiny-chat", max_position_embeddings=4096)
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="session")
def openai_server(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_path = tmp_path_factory.mktemp("openai-server") / "log"
    with TritonServer(deploy(chat_model), openai_port=free_ports(1)[0], log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        yield server


@pytest.fixture(scope="session")
def client(openai_server: TritonServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=openai_server.openai_url, api_key="none", max_retries=0, timeout=60) as found:
        yield found
