"""`ModelRunner`: runs batches on one device. It reads sequences and never changes them; the engine commits tokens."""

from functools import partial

import torch
from torch import Tensor

from ensemble.config import ModelConfig
from ensemble.engine.batch import Batch, StepInput, prepare_step
from ensemble.engine.sampler import sample_tokens
from ensemble.models.llama import Llama
from ensemble.models.opt import Opt
from ensemble.models.spec import ModelSpec
from ensemble.models.weights import fill_with_random_weights, load_weights
from kernels.gather_rows import gather_rows

Model = Llama | Opt


def resolve_dtype(model_config: ModelConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype the model runs in: as configured; `auto` is float32 on a CPU and the checkpoint's on a GPU."""
    if model_config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model_config.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else spec.dtype


def load_model(spec: ModelSpec, model_config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Model:
    """Builds the model on the device and fills its weights. Raises ModelError naming a weight that does not fit."""
    max_positions = model_config.max_model_len or spec.max_model_len
    model_class = Llama if spec.architecture == "llama" else Opt
    model = model_class(spec, max_positions, partial(torch.empty, device=device, dtype=dtype))
    if model_config.load_format == "dummy":
        fill_with_random_weights(model.named_weights(), model_config.seed, device)
    else:
        load_weights(spec.path, model.named_weights(), device)
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        for linear in model.linears():
            linear.pack()
    return model


class ModelRunner:
    """Runs one model over one KV pool, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def __init__(self, model: Model, kv_pool: Tensor, block_size: int) -> None:
        self.model = model
        self.kv_pool = kv_pool
        self.block_size = block_size

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int]:
        """One token id for each prefill row that finishes its prompt, in order, then one for each decode row.

        A row's sequence holds enough blocks for the step's tokens; a decode row's KV is complete but for its last
        token, whose keys and values this step stores.
        """
        step = prepare_step(batch, self.block_size, self.model.spec.eos_token_ids, self.kv_pool.device)
        hidden = self.model.forward(step.token_ids, step.positions, self.kv_pool, step.attention)
        return self._sample(hidden, step)

    def _sample(self, hidden: Tensor, step: StepInput) -> list[int]:
        if step.sampled_tokens.shape[0] == 0:
            return []
        logits = self.model.compute_logits(gather_rows(hidden, step.sampled_tokens))
        token_ids: list[int] = sample_tokens(logits, step.sampling).tolist()
        return token_ids
