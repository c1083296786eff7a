"""LLaMA and its kin, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped-query attention, gated MLP.

They differ in which projections have a bias, in norms of each query and key head, and in windows of attention.
"""

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
from ensemble.models.rope import inverse_frequencies
from ensemble.models.spec import ModelSpec
from ensemble.parallel.shares import share, share_heads
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel
from kernels.activation import silu_and_mul
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rotary_table
from kernels.write_kv import HeadNorms, rope_and_write_kv


class LlamaAttention:
    def __init__(self, spec: ModelSpec, window: int | None, parallel: TensorParallel, empty: Empty) -> None:
        heads, self.head_dim = share_heads(spec.num_heads, spec.num_kv_heads, parallel), spec.head_dim
        self.num_heads, self.num_kv_heads = heads.num_queries, heads.num_kv
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        queries, kv = heads.query_rows(spec.head_dim), heads.kv_rows(spec.head_dim)
        out_sizes, rows = [q_size, kv_size, kv_size], [queries, kv, kv]
        self.qkv_proj = Linear(spec.hidden_size, out_sizes, spec.attention_bias, empty, rows=rows)
        self.o_proj = RowParallelLinear(
            q_size, queries[0], spec.hidden_size, spec.attention_output_bias, parallel, empty
        )
        self.head_norms = None
        if spec.has_head_norms:
            self.head_norms = HeadNorms(empty(spec.head_dim), empty(spec.head_dim), spec.norm_eps)
        self.scale = spec.head_dim**-0.5
        self.window = window

    def __call__(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        rope_and_write_kv(q, k, v, cos_sin, positions, kv_cache, metadata.slot_mapping, self.head_norms)
        return self.o_proj(paged_attention(q, kv_cache, metadata, self.scale, self.window))

    def named_weights(self, prefix: str) -> NamedWeights:
        yield from self.qkv_proj.named_weights([f"{prefix}.{part}_proj" for part in "qkv"])
        yield from self.o_proj.named_weights([f"{prefix}.o_proj"])
        if self.head_norms is not None:
            yield Weight.whole(f"{prefix}.q_norm.weight", self.head_norms.query)
            yield Weight.whole(f"{prefix}.k_norm.weight", self.head_norms.key)


class LlamaMLP:
    def __init__(self, spec: ModelSpec, parallel: TensorParallel, empty: Empty) -> None:
        inner, mine = spec.intermediate_size, share(spec.intermediate_size, parallel)
        self.gate_up_proj = Linear(spec.hidden_size, [inner, inner], spec.mlp_bias, empty, rows=[[mine], [mine]])
        self.down_proj = RowParallelLinear(inner, mine, spec.hidden_size, spec.mlp_bias, parallel, empty)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))

    def named_weights(self, prefix: str) -> NamedWeights:
        yield from self.gate_up_proj.named_weights([f"{prefix}.gate_proj", f"{prefix}.up_proj"])
        yield from self.down_proj.named_weights([f"{prefix}.down_proj"])


class LlamaLayer:
    def __init__(self, spec: ModelSpec, window: int | None, parallel: TensorParallel, empty: Empty) -> None:
        self.input_norm = empty(spec.hidden_size)
        self.attention = LlamaAttention(spec, window, parallel, empty)
        self.post_attention_norm = empty(spec.hidden_size)
        self.mlp = LlamaMLP(spec, parallel, empty)

    def named_weights(self, prefix: str) -> NamedWeights:
        yield Weight.whole(f"{prefix}.input_layernorm.weight", self.input_norm)
        yield from self.attention.named_weights(f"{prefix}.self_attn")
        yield Weight.whole(f"{prefix}.post_attention_layernorm.weight", self.post_attention_norm)
        yield from self.mlp.named_weights(f"{prefix}.mlp")

    def linears(self) -> list[Linear]:
        return [self.attention.qkv_proj, self.attention.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj]


class Llama:
    """LlamaForCausalLM and its kin. No position of a sequence reaches `max_positions`.

    `spec` is the model as this rank runs it: its num_heads and num_kv_heads are the rank's. It has only some of the
    `layers` where it is a place of a pipeline; the first has the embedding, the last what comes after the layers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_positions: int,
        empty: Empty,
        parallel: TensorParallel = SINGLE,
        layers: range | None = None,
    ) -> None:
        if spec.rope is None:
            raise ValueError("a LLaMA has rotary positions")
        heads = share_heads(spec.num_heads, spec.num_kv_heads, parallel)
        self.spec = replace(spec, num_heads=heads.num_queries, num_kv_heads=heads.num_kv)
        self.on_layer: Callable[[], None] = no_progress  # called before each layer
        part = range(spec.num_layers) if layers is None else layers
        self.first_layer, is_last = part.start, part.stop == spec.num_layers
        self.embed_tokens: VocabularyEmbedding | None = None
        self.norm: Tensor | None = None
        self.lm_head: VocabularyHead | None = None
        if self.first_layer == 0 or (is_last and spec.tie_word_embeddings):
            self.embed_tokens = VocabularyEmbedding(spec.vocab_size, spec.hidden_size, parallel, empty)
        windows = [window if window and window < max_positions else None for window in spec.windows]
        self.layers = [LlamaLayer(spec, windows[layer], parallel, empty) for layer in part]
        if is_last:
            self.norm = empty(spec.hidden_size)
            tied = self.embed_tokens if spec.tie_word_embeddings else None
            self.lm_head = VocabularyHead(spec.hidden_size, spec.vocab_size, parallel, empty, tied)
        device = self.layers[0].input_norm.device
        inv_freq = inverse_frequencies(spec.rope, spec.head_dim, max_positions).to(device)
        self.cos_sin = rotary_table(inv_freq, max_positions, spec.rope.attention_factor)

    def forward(
        self,
        token_ids: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64
        kv_pool: Tensor,  # [num_blocks, num_layers, 2, Hkv, block_size, D], updated in place
        metadata: AttentionMetadata,
        hidden: Tensor | None = None,  # [T, hidden_size], of the place before; updated in place
    ) -> Tensor:  # [T, hidden_size]
        """Hidden states after the last norm; of a place that is not the last, those for the next one."""
        eps = self.spec.norm_eps
        residual = self._embed(token_ids) if hidden is None else hidden
        x = rms_norm(residual, self.layers[0].input_norm, eps)
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for layer, kv_cache, next_norm in zip(self.layers, kv_pool.unbind(1), next_norms, strict=True):
            self.on_layer()
            x = layer.attention(x, positions, self.cos_sin, kv_cache, metadata)
            x = add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = layer.mlp(x)
            x = residual.add_(x) if next_norm is None else add_rms_norm(x, residual, next_norm, eps)
        return x

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self.embed_tokens is not None, "the first place has no place before"
        return self.embed_tokens(token_ids)

    def compute_logits(
        self,
        hidden: Tensor,  # [S, hidden_size]
    ) -> Tensor:  # [S, vocab_size]
        assert self.lm_head is not None, "the last place computes logits"
        return self.lm_head(hidden)

    def named_weights(self) -> NamedWeights:
        if self.embed_tokens is not None:
            yield self.embed_tokens.named_weight("model.embed_tokens")
        for index, layer in enumerate(self.layers, self.first_layer):
            yield from layer.named_weights(f"model.layers.{index}")
        if self.norm is not None:
            yield Weight.whole("model.norm.weight", self.norm)
        if self.lm_head is not None and not self.spec.tie_word_embeddings:
            yield from self.lm_head.named_weights(["lm_head"])

    def linears(self) -> list[Linear]:
        """Every matrix product of a step."""
        head = [] if self.lm_head is None else [self.lm_head]
        return [linear for layer in self.layers for linear in layer.linears()] + head
