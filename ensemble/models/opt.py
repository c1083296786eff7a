"""OPT: LayerNorm before each half layer (after it in opt-350m), learned positions, multi-head attention, ReLU MLP."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ensemble.models.layers import (
    AttentionMetadata,
    Empty,
    Linear,
    NamedWeights,
    Weight,
    no_progress,
    paged_attention,
)
from ensemble.models.parallel_layers import RowParallelLinear, VocabularyEmbedding, VocabularyHead
from ensemble.models.spec import ModelSpec
from ensemble.parallel.shares import share, share_heads
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel
from kernels.activation import bias_activation
from kernels.embedding import embed, embed_with_positions
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.write_kv import write_kv

_POSITION_OFFSET = 2  # the position table of every OPT checkpoint starts with two unused rows


class LayerNorm:
    def __init__(self, spec: ModelSpec, empty: Empty) -> None:
        self.weight, self.bias = empty(spec.hidden_size), empty(spec.hidden_size)
        self.eps = spec.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds `x` to `residual` in place and returns the norm of the sum."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def named_weights(self, name: str) -> NamedWeights:
        yield Weight.whole(f"{name}.weight", self.weight)
        yield Weight.whole(f"{name}.bias", self.bias)


class OptAttention:
    def __init__(self, spec: ModelSpec, parallel: TensorParallel, empty: Empty) -> None:
        heads, self.head_dim = share_heads(spec.num_heads, spec.num_kv_heads, parallel), spec.head_dim
        self.num_heads = heads.num_queries
        width, mine = spec.hidden_size, heads.query_rows(spec.head_dim)
        self.qkv_proj = Linear(width, [width] * 3, spec.attention_bias, empty, rows=[mine] * 3)
        self.out_proj = RowParallelLinear(width, mine[0], width, spec.attention_output_bias, parallel, empty)
        self.scale = spec.head_dim**-0.5

    def __call__(self, x: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        q, k, v = self.qkv_proj(x).view(x.shape[0], 3, self.num_heads, self.head_dim).unbind(1)
        write_kv(k, v, kv_cache, metadata.slot_mapping)
        return self.out_proj(paged_attention(q, kv_cache, metadata, self.scale))

    def named_weights(self, prefix: str) -> NamedWeights:
        yield from self.qkv_proj.named_weights([f"{prefix}.{part}_proj" for part in "qkv"])
        yield from self.out_proj.named_weights([f"{prefix}.out_proj"])


class OptMLP:
    def __init__(self, spec: ModelSpec, parallel: TensorParallel, empty: Empty) -> None:
        inner, mine = spec.intermediate_size, share(spec.intermediate_size, parallel)
        self.fc1 = Linear(spec.hidden_size, [inner], spec.mlp_bias, empty, rows=[[mine]])
        self.fc2 = RowParallelLinear(inner, mine, spec.hidden_size, spec.mlp_bias, parallel, empty)
        self.activation = spec.activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc2(bias_activation(self.fc1.without_bias(x), self.fc1.bias, self.activation))

    def named_weights(self, prefix: str) -> NamedWeights:
        yield from self.fc1.named_weights([f"{prefix}.fc1"])
        yield from self.fc2.named_weights([f"{prefix}.fc2"])


class OptLayer:
    def __init__(self, spec: ModelSpec, parallel: TensorParallel, empty: Empty) -> None:
        self.attention_norm = LayerNorm(spec, empty)
        self.attention = OptAttention(spec, parallel, empty)
        self.mlp_norm = LayerNorm(spec, empty)
        self.mlp = OptMLP(spec, parallel, empty)

    def named_weights(self, prefix: str) -> NamedWeights:
        yield from self.attention_norm.named_weights(f"{prefix}.self_attn_layer_norm")
        yield from self.attention.named_weights(f"{prefix}.self_attn")
        yield from self.mlp_norm.named_weights(f"{prefix}.final_layer_norm")
        yield from self.mlp.named_weights(prefix)

    def linears(self) -> list[Linear]:
        return [self.attention.qkv_proj, self.attention.out_proj, self.mlp.fc1, self.mlp.fc2]


class Opt:
    """OPTForCausalLM. The position table is as long as the checkpoint's, whatever `max_positions` is.

    `spec` is the model as this rank runs it: its num_heads and num_kv_heads are the rank's. It has only some of the
    `layers` where it is a place of a pipeline; the first has the embeddings, the last what comes after the layers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_positions: int,
        empty: Empty,
        parallel: TensorParallel = SINGLE,
        layers: range | None = None,
    ) -> None:
        heads = share_heads(spec.num_heads, spec.num_kv_heads, parallel)
        self.spec = replace(spec, num_heads=heads.num_queries, num_kv_heads=heads.num_kv)
        self.on_layer: Callable[[], None] = no_progress  # called before each layer
        self.is_fused = parallel.size == 1 and spec.embedding_size == spec.hidden_size  # both embeddings in one kernel
        part = range(spec.num_layers) if layers is None else layers
        self.first_layer, is_first, is_last = part.start, part.start == 0, part.stop == spec.num_layers
        is_projected = spec.embedding_size != spec.hidden_size
        self.embed_tokens: VocabularyEmbedding | None = None
        self.embed_positions: Tensor | None = None
        self.final_norm: LayerNorm | None = None
        self.project_in: Linear | None = None
        self.project_out: Linear | None = None
        self.lm_head: VocabularyHead | None = None
        if is_first or (is_last and spec.tie_word_embeddings):
            self.embed_tokens = VocabularyEmbedding(spec.vocab_size, spec.embedding_size, parallel, empty)
        if is_first:
            self.embed_positions = empty(spec.max_model_len + _POSITION_OFFSET, spec.hidden_size)
        self.layers = [OptLayer(spec, parallel, empty) for _ in part]
        if is_last and spec.is_pre_norm:
            self.final_norm = LayerNorm(spec, empty)
        if is_first and is_projected:
            self.project_in = Linear(spec.embedding_size, [spec.hidden_size], False, empty)
        if is_last and is_projected:
            self.project_out = Linear(spec.hidden_size, [spec.embedding_size], False, empty)
        if is_last:
            tied = self.embed_tokens if spec.tie_word_embeddings else None
            self.lm_head = VocabularyHead(spec.embedding_size, spec.vocab_size, parallel, empty, tied)

    def forward(
        self,
        token_ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        kv_pool: Tensor,  # [num_blocks, num_layers, 2, Hkv, block_size, D], updated in place
        metadata: AttentionMetadata,
        hidden: Tensor | None = None,  # [T, hidden_size], of the place before; updated in place
    ) -> Tensor:  # [T, hidden_size]
        """Hidden states after the last norm; of a place that is not the last, those for the next one."""
        x = self._embed(token_ids, positions) if hidden is None else hidden
        kv_caches = kv_pool.unbind(1)
        return (self._pre_norm if self.spec.is_pre_norm else self._post_norm)(x, kv_caches, metadata)

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        assert self.embed_tokens is not None and self.embed_positions is not None, "the first place has no place before"
        if self.is_fused:
            weights = self.embed_tokens.weight, self.embed_positions
            return embed_with_positions(token_ids, weights[0], positions, weights[1], _POSITION_OFFSET)
        x = self.embed_tokens(token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + embed(positions + _POSITION_OFFSET, self.embed_positions)

    def _pre_norm(self, residual: Tensor, kv_caches: tuple[Tensor, ...], metadata: AttentionMetadata) -> Tensor:
        x = self.layers[0].attention_norm(residual)
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        for layer, kv_cache, next_norm in zip(self.layers, kv_caches, next_norms, strict=True):
            self.on_layer()
            x = layer.mlp_norm.add(layer.attention(x, kv_cache, metadata), residual)
            x = layer.mlp(x)
            x = residual.add_(x) if next_norm is None else next_norm.add(x, residual)
        return x

    def _post_norm(self, x: Tensor, kv_caches: tuple[Tensor, ...], metadata: AttentionMetadata) -> Tensor:
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            self.on_layer()
            x = layer.attention_norm.add(layer.attention(x, kv_cache, metadata), residual=x)
            x = layer.mlp_norm.add(layer.mlp(x), residual=x)
        return x

    def compute_logits(
        self,
        hidden: Tensor,  # [S, hidden_size]
    ) -> Tensor:  # [S, vocab_size]
        assert self.lm_head is not None, "the last place computes logits"
        return self.lm_head(hidden if self.project_out is None else self.project_out(hidden))

    def named_weights(self) -> NamedWeights:
        if self.embed_tokens is not None:
            yield self.embed_tokens.named_weight("model.decoder.embed_tokens")
        if self.embed_positions is not None:
            yield Weight.whole("model.decoder.embed_positions.weight", self.embed_positions)
        for linear, name in ((self.project_in, "project_in"), (self.project_out, "project_out")):
            if linear is not None:
                yield from linear.named_weights([f"model.decoder.{name}"])
        for index, layer in enumerate(self.layers, self.first_layer):
            yield from layer.named_weights(f"model.decoder.layers.{index}")
        if self.final_norm is not None:
            yield from self.final_norm.named_weights("model.decoder.final_layer_norm")
        if self.lm_head is not None and not self.spec.tie_word_embeddings:
            yield from self.lm_head.named_weights(["lm_head"])

    def linears(self) -> list[Linear]:
        """Every matrix product of a step."""
        projections = [self.project_in, *(linear for layer in self.layers for linear in layer.linears())]
        return [linear for linear in [*projections, self.project_out, self.lm_head] if linear is not None]
