"""A server of a model too small to matter, on the CPU: for what tests and measures the way around the model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemble.config import Deployment
from tools.proofs.gpu_smoke import write_model_dir
from tools.server.triton_server import TritonServer

TINY_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 384,
    "eos_token_id": 2,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>",
}


@contextmanager
def tiny_server(openai_port: int | None = None, **scheduler: str) -> Iterator[TritonServer]:
    """Ready, with dummy weights. `scheduler`: fields of that part of the deployment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model_dir(path, TINY_MODEL)
        (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
        stage = {"devices": ["cpu"], "kv_cache_bytes": 64 << 20}
        model = {"path": path, "load_format": "dummy", "dtype": "float32"}
        deployment = Deployment.parse({"model": model, "prefill": stage, "decode": stage, "scheduler": scheduler})
        with TritonServer(deployment, log_path=Path(folder) / "log", openai_port=openai_port) as server:
            server.wait_ready(timeout_s=120)
            yield server
