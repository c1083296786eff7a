"""Weights into a model: from a checkpoint, each tensor read once, or random.

Checkpoints of OPT exist with and without the prefixes `model.` and `decoder.`; names are compared without them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ensemble.errors import ModelError
from ensemble.models.checkpoint import Checkpoint
from ensemble.models.spec import ModelSpec

HEAD = "lm_head.weight"
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def with_true_ties(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """As in transformers: an output projection that the checkpoint holds with values of its own is not tied."""
    keys = _keys_by_name(checkpoint)
    embedding, head = (keys.get(_without_prefixes(name)) for name in (EMBEDDINGS[spec.architecture], HEAD))
    if not spec.tie_word_embeddings or embedding is None or head is None or checkpoint.holds_equal(embedding, head):
        return spec
    return replace(spec, tie_word_embeddings=False)


def load_weights(
    checkpoint: Checkpoint,
    named_weights: Iterable[tuple[str, Tensor]],  # checkpoint name |-> tensor to fill
    device: torch.device,
    stand_ins: Mapping[str, str],  # name |-> of another tensor with its values, should the checkpoint lack it
) -> None:
    """Fills every tensor. Raises ModelError naming the weight that is missing, or has another shape or kind."""
    keys = _keys_by_name(checkpoint)
    tensors: dict[str, Tensor] = {}  # key in the checkpoint |-> tensor to fill
    for name, tensor in named_weights:
        key = keys.get(_without_prefixes(name)) or keys.get(_without_prefixes(stand_ins.get(name, name)))
        if key is None:
            raise ModelError(f"model {checkpoint.path}: weight {name} is missing")
        tensors[key] = tensor
    for key, weight in checkpoint.read(tensors, device):
        where = f"model {checkpoint.path}: weight {key} in {checkpoint.file_of[key]}"
        if weight.shape != tensors[key].shape:
            raise ModelError(
                f"{where} has shape {tuple(weight.shape)}, config.json asks for {tuple(tensors[key].shape)}"
            )
        if weight.dtype not in _DTYPES:
            raise ModelError(f"{where} is of dtype {str(weight.dtype).removeprefix('torch.')}: not supported")
        tensors[key].copy_(weight)


def fill_with_random_weights(named_weights: Iterable[tuple[str, Tensor]], seed: int, device: torch.device) -> None:
    """Fills every tensor from N(0, 0.02), the weights of norms from N(1, 0.02).

    On one kind of device the values are a function of (seed, name) alone, so that two workers agree.
    """
    generator = torch.Generator(device)
    for name, tensor in named_weights:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        is_norm = tensor.ndim == 1 and "norm" in name and name.endswith(".weight")
        tensor.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)


def _keys_by_name(checkpoint: Checkpoint) -> dict[str, str]:
    return {_without_prefixes(key): key for key in checkpoint.file_of}


def _without_prefixes(name: str) -> str:
    return name.removeprefix("model.").removeprefix("decoder.")
