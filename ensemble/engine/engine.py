"""One engine step: run a batch, commit its tokens. Scheduling is the caller's, so that the same engine serves a
replica's loop and `tools.offline`.

On a GPU a step may be launched before the tokens of the one before are read: the host prepares while the GPU works.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ensemble.cache.block_manager import BlockManager
from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.config import Deployment, StageConfig
from ensemble.engine.batch import Batch
from ensemble.engine.model_runner import Model, ModelRunner, load_model, resolve_dtype
from ensemble.engine.step_handle import StepHandle
from ensemble.errors import ConfigError
from ensemble.models.layer_split import split_layers
from ensemble.models.spec import ModelSpec, load_model_spec
from ensemble.parallel.group import ALONE, Group
from ensemble.parallel.shares import share_heads
from ensemble.request import Sequence, TokenLogProbs

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
GPU_RESERVE_BYTES = 3 << 29  # CUDA's own context, cuBLAS workspaces and the graphs, which come beside the pool


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. Its blocks are in use until it has been committed."""

    batch: Batch
    handle: StepHandle


class Engine:
    """A model, its KV pool and the pool's blocks, on one device: a rank's part of them, where `group` has several."""

    def __init__(self, spec: ModelSpec, runner: ModelRunner, pool: KVPool, group: Group = ALONE) -> None:
        self.spec = spec
        self.group = group
        self.runner = runner
        self.pool = pool
        self.block_bytes = sum(map(int, group.all_of("block_bytes", str(pool.layout.block_bytes))))  # of all ranks
        self.blocks = BlockManager(pool.num_blocks, pool.layout.block_size)
        self.eos_token_ids = frozenset(spec.eos_token_ids)

    @property
    def runs_ahead(self) -> bool:
        """Whether a sequence's next step is launched before its token is read: on a GPU, but not in a pipeline."""
        return self.pool.tensor.is_cuda and not self.is_pipeline

    @property
    def is_pipeline(self) -> bool:
        """Whether steps of different sequences are in flight together, as many as there are places."""
        return self.group.pipeline.size > 1

    @property
    def max_num_unread(self) -> int:
        """Steps that are still in flight when the next one has been launched."""
        return self.group.pipeline.size - 1 if self.is_pipeline else int(self.runs_ahead)

    def step(self, batch: Batch) -> list[Sequence]:
        """Runs the batch and commits it. Returns the sequences that got a token, in batch order."""
        return self.commit(self.launch(batch))

    def launch(self, batch: Batch) -> Launched:
        """Starts a step. At most `max_num_unread` launched steps may be uncommitted at that time."""
        launched = Launched(batch, self.runner.launch(batch))
        for row in batch.prefills:
            row.sequence.num_computed_tokens = row.end
        return launched

    def commit(
        self, launched: Launched, log_probs_of: Callable[[], dict[int, TokenLogProbs]] | None = None
    ) -> list[Sequence]:
        """Waits for the step and gives each live sequence its token, and log-probabilities if it asks for them.

        Those that have ended meanwhile get none. Steps are committed in their order. `log_probs_of` tells of the
        log-probabilities, by request_id, where they are another rank's.
        """
        token_ids = launched.handle.token_ids()
        log_probs = launched.handle.log_probs() if log_probs_of is None else log_probs_of()
        for sequence in launched.batch.decodes:
            sequence.num_computed_tokens += 1
        live = [
            (sequence, token_id)
            for sequence, token_id in zip(launched.batch.sampled, token_ids, strict=True)
            if not sequence.is_finished
        ]
        for sequence, token_id in live:
            sequence.append(token_id, self.eos_token_ids)
            sequence.last_log_probs = log_probs.get(sequence.request_id)
        return [sequence for sequence, _ in live]


def load_engine(
    deployment: Deployment,
    stage: StageConfig,
    device: torch.device,
    group: Group = ALONE,
    on_layer: Callable[[], None] | None = None,  # called as often as a layer is launched, on a CPU: computed
) -> Engine:
    """Loads the model, takes the pool's memory, and on a GPU compiles kernels and captures the graphs.

    Every rank of `group` loads its part, at the same time; their pools have as many blocks, of each rank's layers and
    heads.
    Raises ConfigError or ModelError in one line.
    """
    spec = load_model_spec(deployment.model.path)
    max_model_len = deployment.model.limit_model_len(spec.max_model_len)
    max_num_prompt_tokens = max(deployment.prefill.max_num_batched_tokens, deployment.decode.local_prefill_tokens)
    max_num_batched_tokens = max_num_prompt_tokens + stage.max_num_seqs  # in the largest step
    dtype = resolve_dtype(deployment.model, spec, device)
    use_device(device)
    kv_heads = share_heads(spec.num_heads, spec.num_kv_heads, group.tensor).kv
    layers = split_layers(spec, stage)[group.pipeline.place]
    layout = KVLayout(len(layers), len(kv_heads), deployment.block_size, spec.head_dim, dtype, layers.start, kv_heads)
    try:
        model = load_model(spec, deployment.model, device, dtype, group.tensor, layers)
        num_bytes = stage.kv_cache_bytes or default_kv_cache_bytes(
            model, layout, stage, device, max_num_batched_tokens, max_model_len, group
        )
        pool = KVPool(layout, group.smallest(layout.num_blocks_in(num_bytes)), device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(f"{device} has no memory for the model and its KV pool: {reason}") from None
    runner = ModelRunner(model, pool.tensor, deployment.block_size, group)
    runner.warm_up(stage.max_num_seqs, max_num_batched_tokens, max_model_len)
    if on_layer is not None:
        model.on_layer = on_layer
    return Engine(spec, runner, pool, group)


def use_device(device: torch.device) -> None:
    """Makes a GPU the current one. Raises ConfigError if it is not there."""
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"devices = {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)


def default_kv_cache_bytes(
    model: Model,
    layout: KVLayout,
    stage: StageConfig,
    device: torch.device,
    max_num_batched_tokens: int,
    max_model_len: int,
    group: Group = ALONE,
) -> int:
    """The pool's size where none is configured: on a GPU what the stage's share leaves beside weights and activations.

    Activations are measured by a pass of the largest prefill batch. Another process's memory does not count: two
    stages on one GPU are told apart by their shares alone.
    """
    if device.type == "cpu":
        return DEFAULT_CPU_KV_CACHE_BYTES
    torch.cuda.reset_peak_memory_stats(device)
    one_block = torch.zeros(1, *layout.block_shape, dtype=layout.dtype, device=device)
    ModelRunner(model, one_block, layout.block_size, group).run_largest(max_num_batched_tokens, max_model_len)
    used = torch.cuda.max_memory_reserved(device) + GPU_RESERVE_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    available = int(total * stage.gpu_memory_utilization) - used
    if available < layout.block_bytes:
        raise ConfigError(
            f"gpu_memory_utilization = {stage.gpu_memory_utilization}: weights and activations take {used >> 20} MiB"
            f" of this share of {device}'s {total >> 20} MiB and leave nothing for the KV pool"
        )
    return available
