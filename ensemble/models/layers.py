"""What all architectures are made of. Plain classes around tensors: this is inference, so nothing trains or registers.

Each layer can say, by `named_weights`, which part of a checkpoint's tensor fills which of its tensors (or slices of
its fused tensors); that mapping is all that loading knows of a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decode_attention import decode_attention
from kernels.decode_linear import decode_linear, reads_faster
from kernels.decode_plan import DecodeWorkspace
from kernels.prefill_attention import prefill_attention
from kernels.prefill_plan import PrefillWorkspace

Empty = Callable[..., Tensor]  # torch.empty with device and dtype bound


class Weight(NamedTuple):
    """A tensor of the model, and the part of a checkpoint's tensor that fills it."""

    name: str  # in the checkpoint
    tensor: Tensor  # to fill
    shape: tuple[int, ...]  # of the checkpoint's tensor
    start: tuple[int, ...]  # where in it the part begins, which has `tensor`'s shape

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Weight":
        return cls(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim)

    @property
    def part(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.tensor.shape, strict=True))


NamedWeights = Iterator[Weight]


def no_progress() -> None:
    """Nobody waits for word of each layer."""


# False: every product on a GPU is cuBLAS's. tools.benchmarks.engine compares the two.
use_decode_linear = True


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where a step's tokens and their contexts are in the KV pool.

    tokens     |<-- chunks of the S_p prefill rows -->|<- one token per decode row ->|
    sequences  |<---------- S_p prefill rows -------->|<------ S_d decode rows ----->|
    """

    num_prefills: int
    num_prefill_tokens: int
    slot_mapping: Tensor  # [T] int64: block_id * block_size + offset of each token, -1 = padding
    cu_seqlens_q: Tensor  # [S_p + S_d + 1] int32
    context_lens: Tensor  # [S_p + S_d] int32, this step's tokens included
    block_tables: Tensor  # [S_p + S_d, max_blocks] int32
    # On a GPU one of the two, with the step's plan: with prompts in it, decode rows are sequences of one query.
    prefill_workspace: PrefillWorkspace | None = None
    decode_workspace: DecodeWorkspace | None = None


def paged_attention(
    q: Tensor,  # [T, Hq, D]
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D], the step's keys and values written
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:  # [T, Hq * D]
    """Causal attention of a step's tokens over everything before them; over `window` tokens, their own included."""
    tables, starts, lens = metadata.block_tables, metadata.cu_seqlens_q, metadata.context_lens
    if metadata.prefill_workspace is not None:
        out = prefill_attention(q, kv_cache, tables, starts, lens, scale, metadata.prefill_workspace, window)
        return out.view(q.shape[0], -1)
    split, rows = metadata.num_prefill_tokens, metadata.num_prefills
    parts = []
    if split > 0:
        parts.append(
            prefill_attention(q[:split], kv_cache, tables[:rows], starts[: rows + 1], lens[:rows], scale, window=window)
        )
    if split < q.shape[0]:
        workspace = metadata.decode_workspace
        parts.append(decode_attention(q[split:], kv_cache, tables[rows:], lens[rows:], scale, workspace, window))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(q.shape[0], -1)


MIN_PACKED = 1 << 16  # elements


class Linear:
    """y = x W^T + b. Projections of one input are fused: their rows lie below each other in one weight.

    `rows` are those that are held of each projection, runs in order, and `columns` those of all of them; by default
    all. `weight` is given where it is another's too: an output projection tied to the embedding.
    """

    def __init__(
        self,
        in_size: int,
        out_sizes: list[int],
        has_bias: bool,
        empty: Empty,
        weight: Tensor | None = None,
        rows: list[list[range]] | None = None,
        columns: range | None = None,
    ) -> None:
        self.in_size, self.out_sizes = in_size, out_sizes
        self.rows = [[range(size)] for size in out_sizes] if rows is None else rows
        self.columns = range(in_size) if columns is None else columns
        num_rows = sum(len(run) for runs in self.rows for run in runs)
        self.weight = empty(num_rows, len(self.columns)) if weight is None else weight
        self.bias = empty(num_rows) if has_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.weight.is_mkldnn:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
            return packed
        if use_decode_linear and reads_faster(x, self.weight):
            return decode_linear(x, self.weight, bias)
        return F.linear(x, self.weight, bias)

    def pack(self) -> None:
        """Brings the loaded weight into oneDNN's own order; `named_weights`, which is for loading, ends with that.

        Measured on an AMD EPYC, one thread, SmolLM2's shapes: 1.9 times faster than F.linear at batch 1, 3.3 at 8. A
        small weight stays as it is: a call of oneDNN's costs 9 us, all of F.linear 2.
        """
        if self.weight.numel() < MIN_PACKED:
            return
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def named_weights(self, names: list[str]) -> NamedWeights:
        """`names` are those of the fused projections, in order."""
        before = 0
        for name, out_size, runs in zip(names, self.out_sizes, self.rows, strict=True):
            for run in runs:
                held = slice(before, before + len(run))
                shape, start = (out_size, self.in_size), (run.start, self.columns.start)
                yield Weight(f"{name}.weight", self.weight[held], shape, start)
                if self.bias is not None:
                    yield Weight(f"{name}.bias", self.bias[held], shape[:1], start[:1])
                before += len(run)
