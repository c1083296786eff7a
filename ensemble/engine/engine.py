"""One engine step: run a batch, commit its tokens. Scheduling is the caller's, so that the same engine serves the
prefill worker, the decode worker and `tools.offline`.
"""

import torch

from ensemble.cache.block_manager import BlockManager
from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.config import Deployment, StageConfig
from ensemble.engine.batch import Batch
from ensemble.engine.model_runner import ModelRunner, load_model, resolve_dtype
from ensemble.errors import ConfigError
from ensemble.models.spec import ModelSpec, load_model_spec
from ensemble.request import Sequence

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
# CUDA graphs, cuBLAS workspaces and the allocator's slack come after the pool is sized.
GPU_RESERVE_BYTES = 1 << 30


class Engine:
    """A model, its KV pool and the pool's blocks, on one device."""

    def __init__(self, spec: ModelSpec, runner: ModelRunner, pool: KVPool) -> None:
        self.spec = spec
        self.runner = runner
        self.pool = pool
        self.blocks = BlockManager(pool.num_blocks, pool.layout.block_size)
        self.eos_token_ids = frozenset(spec.eos_token_ids)

    def step(self, batch: Batch) -> list[Sequence]:
        """Runs the batch and commits it. Returns the sequences that got a token, in batch order."""
        token_ids = self.runner.run(batch)
        for row in batch.prefills:
            row.sequence.num_computed_tokens = row.start + row.length
        for sequence in batch.decodes:
            sequence.num_computed_tokens += 1
        for sequence, token_id in zip(batch.sampled, token_ids, strict=True):
            sequence.append(token_id, self.eos_token_ids)
        return batch.sampled


def load_engine(deployment: Deployment, stage: StageConfig, device: torch.device) -> Engine:
    """Loads the model and takes the pool's memory. Raises ConfigError or ModelError in one line."""
    spec = load_model_spec(deployment.model.path)
    deployment.model.limit_model_len(spec.max_model_len)
    dtype = resolve_dtype(deployment.model, spec, device)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"devices = {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    model = load_model(spec, deployment.model, device, dtype)
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, deployment.block_size, spec.head_dim, dtype)
    try:
        pool = KVPool(layout, layout.num_blocks_in(kv_cache_bytes(stage, device)), device)
    except (torch.OutOfMemoryError, MemoryError, OSError) as error:
        raise ConfigError(f"kv_cache_bytes: no memory for the KV pool on {device}: {error}") from None
    return Engine(spec, ModelRunner(model, pool.tensor, deployment.block_size), pool)


def kv_cache_bytes(stage: StageConfig, device: torch.device) -> int:
    """The pool's size in bytes: as configured, or on a GPU what the stage's share leaves after the weights."""
    if stage.kv_cache_bytes is not None:
        return stage.kv_cache_bytes
    if device.type == "cpu":
        return DEFAULT_CPU_KV_CACHE_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    available = int(total * stage.gpu_memory_utilization) - torch.cuda.memory_reserved(device) - GPU_RESERVE_BYTES
    if available <= 0:
        raise ConfigError(
            f"gpu_memory_utilization = {stage.gpu_memory_utilization}: the weights leave nothing of this share of"
            f" {device}'s {total >> 20} MiB for the KV pool"
        )
    return available
