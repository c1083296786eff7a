"""Weights into a model: from a checkpoint, of which each tensor's part is read once, or random.

Checkpoints of OPT exist with and without the prefixes `model.` and `decoder.`; names are compared without them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from ensemble.errors import ModelError
from ensemble.models.checkpoint import Checkpoint
from ensemble.models.layers import Weight
from ensemble.models.spec import ModelSpec

HEAD = "lm_head.weight"
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def with_true_ties(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """As in transformers: an output projection that the checkpoint holds with values of its own is not tied."""
    keys = _keys_by_name(checkpoint)
    embedding, head = (keys.get(_without_prefixes(name)) for name in (EMBEDDINGS[spec.architecture], HEAD))
    if not spec.tie_word_embeddings or embedding is None or head is None:
        return spec
    values = checkpoint.tensor(embedding)
    return replace(spec, tie_word_embeddings=torch.equal(values, checkpoint.tensor(head).to(values.dtype)))


def load_weights(
    checkpoint: Checkpoint,
    weights: Iterable[Weight],
    device: torch.device,
    stand_ins: Mapping[str, str],  # name |-> of another tensor with its values, should the checkpoint lack it
) -> None:
    """Fills every tensor with its part. Raises ModelError naming the weight that is missing, or of another kind."""
    keys = _keys_by_name(checkpoint)
    wanted: dict[str, list[tuple[str, Weight]]] = {}  # file |-> key in it and what it fills
    for weight in weights:
        names = (weight.name, stand_ins.get(weight.name, weight.name))
        key = next((keys[name] for name in map(_without_prefixes, names) if name in keys), None)
        if key is None:
            raise ModelError(f"model {checkpoint.path}: weight {weight.name} is missing")
        wanted.setdefault(checkpoint.file_of[key], []).append((key, weight))
    for file, its_weights in wanted.items():
        with checkpoint.open(file, device) as opened:
            for key, weight in its_weights:
                where = f"model {checkpoint.path}: weight {key} in {file}"
                if opened.shape(key) != weight.shape:
                    raise ModelError(f"{where} has shape {opened.shape(key)}, config.json asks for {weight.shape}")
                values = opened.read(key, weight.part)
                if values.dtype not in _DTYPES:
                    raise ModelError(f"{where} is of dtype {str(values.dtype).removeprefix('torch.')}: not supported")
                weight.tensor.copy_(values)


def fill_with_random_weights(weights: Iterable[Weight], seed: int, device: torch.device) -> None:
    """Fills every tensor from N(0, 0.02), the weights of norms from N(1, 0.02).

    On one kind of device the values of a checkpoint's tensor are a function of (seed, name, shape) alone: workers
    agree, and a rank's part is the part of the same tensor for every number of ranks.
    """
    generator = torch.Generator(device)
    for weight in weights:
        digest = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        is_norm = len(weight.shape) == 1 and "norm" in weight.name and weight.name.endswith(".weight")
        is_whole = weight.shape == tuple(weight.tensor.shape)
        values = weight.tensor if is_whole else torch.empty(weight.shape, dtype=weight.tensor.dtype, device=device)
        values.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)
        if not is_whole:
            weight.tensor.copy_(values[weight.part])


def _keys_by_name(checkpoint: Checkpoint) -> dict[str, str]:
    return {_without_prefixes(key): key for key in checkpoint.file_of}


def _without_prefixes(name: str) -> str:
    return name.removeprefix("model.").removeprefix("decoder.")
