"""Steps with prompts as CUDA graphs: up to a few thousand tokens the launches of a forward pass cost the host more than
they may.

A graph is captured for each of a few token counts (see token_counts.py); a batch takes the next larger one and pads.
A padding token has slot -1 and belongs to no sequence; a padding row is a sequence without queries. Decode rows, in a
step with both, are sequences of one query. What is done for the sampled tokens alone comes after the graph.

    host buffer --one copy of its used part--> device buffer --views--> every graph
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ensemble.engine import token_counts
from ensemble.engine.batch import Batch
from ensemble.engine.sampler import Unread
from ensemble.engine.staging import Array, Staging
from ensemble.models.layers import AttentionMetadata
from ensemble.models.llama import Llama
from ensemble.models.opt import Opt
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel
from kernels.prefill_plan import plan_prefill, prefill_workspace

TOKENS_PER_PROMPT = 32  # of a graph: it has room for a prompt for every so many tokens, beside its decode rows
MAX_NUM_TOKENS = 2176  # from here on launches are a small part of a step


class PrefillInputs:
    """The inputs of up to `max_num_tokens` tokens of up to `max_num_rows` sequences, on the host and on the device."""

    def __init__(self, max_num_tokens: int, max_num_rows: int, max_blocks: int, device: torch.device) -> None:
        max_num_tokens += max_num_tokens % 2
        wide, row_words, width = 6 * max_num_tokens, -(-(max_num_rows + 1) // 4) * 4, -(-max_blocks // 4) * 4
        self._tables_start = wide + 2 * row_words  # in int32 words; every section is aligned to 16 bytes
        self._host = np.zeros(self._tables_start + max_num_rows * width, dtype=np.int32)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=device)

        self._token_ids, self._positions, self._slots = self._host[:wide].view(np.int64).reshape(3, max_num_tokens)
        self._cu_seqlens = self._host[wide : wide + max_num_rows + 1]
        self._context_lens = self._host[wide + row_words : wide + row_words + max_num_rows]
        self._block_tables = self._host[self._tables_start :].reshape(max_num_rows, width)

        wide_on_device = self._device[:wide].view(torch.int64).view(3, max_num_tokens)
        self.token_ids, self.positions, self.slot_mapping = wide_on_device
        self.cu_seqlens_q = self._device[wide : wide + max_num_rows + 1]
        self.context_lens = self._device[wide + row_words : wide + row_words + max_num_rows]
        self.block_tables = self._device[self._tables_start :].view(max_num_rows, width)

    def fill(self, tokens: dict[str, Array], padded_size: int, staging: Staging) -> None:
        """Brings a step (`batch.token_arrays`) to the device, padded to so many tokens."""
        num_tokens, num_rows = len(tokens["token_ids"]), len(tokens["context_lens"])
        for section, name, padding in (
            (self._token_ids, "token_ids", 0),
            (self._positions, "positions", 0),
            (self._slots, "slot_mapping", -1),
        ):
            section[:num_tokens] = tokens[name]
            section[num_tokens:padded_size] = padding
        self._cu_seqlens[: num_rows + 1] = tokens["cu_seqlens_q"]
        self._cu_seqlens[num_rows + 1 :] = num_tokens
        self._context_lens[:num_rows] = tokens["context_lens"]
        self._context_lens[num_rows:] = 0
        self._block_tables[:num_rows, : tokens["block_tables"].shape[1]] = tokens["block_tables"]
        num_words = self._tables_start + num_rows * self._block_tables.shape[1]
        staging.upload(self._host[:num_words], self._device[:num_words])


class PrefillGraphs:
    """The graphs of one model over one KV pool, for prompts and up to `max_num_decodes` decode rows beside them.

    Capture runs every one once, which also compiles its kernels.
    """

    def __init__(
        self,
        model: Llama | Opt,
        kv_pool: Tensor,
        block_size: int,
        max_num_tokens: int,
        max_num_decodes: int,
        max_model_len: int,
        parallel: TensorParallel = SINGLE,
    ) -> None:
        device, spec = kv_pool.device, model.spec
        self._max_num_decodes = max_num_decodes
        counts = token_counts.candidates(min(max_num_tokens, MAX_NUM_TOKENS))
        times = parallel.of_first(token_counts.measure(_products(model), counts))  # graphs with NCCL in them: the same
        self._sizes = token_counts.worth_capturing(counts, times)
        self._hidden_in = None
        if model.first_layer > 0:
            self._hidden_in = torch.zeros(self._sizes[-1], spec.hidden_size, dtype=kv_pool.dtype, device=device)
        max_num_rows, max_blocks = self._num_rows(self._sizes[-1]), -(-max_model_len // block_size)
        self._inputs = PrefillInputs(self._sizes[-1], max_num_rows, max_blocks, device)
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._workspace = prefill_workspace(self._sizes[-1], max_num_rows, *heads, kv_pool.dtype, device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        memory = None
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            staging = Staging(device)
            self._inputs.fill(_NO_TOKENS, size, staging)
            hidden = self._forward(model, kv_pool, size)
            if not self._graphs:
                self._hidden = torch.empty_like(hidden)  # of every graph: each would keep its own
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # NCCL's watchdog calls too
                self._hidden[:size].copy_(self._forward(model, kv_pool, size))
            memory = memory or graph.pool()
            self._graphs[size] = graph

    def size_for(self, batch: Batch) -> int | None:
        """The tokens of the smallest graph that has room for this step with prompts; None if there is none."""
        num_decodes = len(batch.decodes)
        num_tokens = sum(row.length for row in batch.prefills) + num_decodes
        num_rows = len(batch.prefills) + num_decodes
        if num_decodes > self._max_num_decodes:
            return None
        return next((size for size in self._sizes if size >= num_tokens and self._num_rows(size) >= num_rows), None)

    def run(
        self,
        size: int,
        arrays: dict[str, dict[str, Array]],
        sampled_before: Tensor | None,
        staging: Staging,
        hidden_in: Tensor | None = None,  # [T, hidden_size], of the place before in a pipeline
    ) -> Tensor:  # [>= T, hidden_size], until the next run
        """Launches a step (`batch.token_arrays`) and returns the hidden states to come, in the order of its tokens."""
        self._inputs.fill(arrays["tokens"], size, staging)
        if "unread" in arrays and sampled_before is not None:
            unread = staging.to_device({"unread": arrays["unread"]})["unread"]
            Unread(**unread).fill(self._inputs.token_ids, sampled_before)
        if hidden_in is not None and self._hidden_in is not None:
            self._hidden_in[: len(hidden_in)].copy_(hidden_in)
        self._graphs[size].replay()
        return self._hidden

    def _num_rows(self, size: int) -> int:
        """Sequences of a graph."""
        return max(2, size // TOKENS_PER_PROMPT) + self._max_num_decodes

    def _forward(self, model: Llama | Opt, kv_pool: Tensor, size: int) -> Tensor:
        inputs, num_rows = self._inputs, self._num_rows(size)
        attention = AttentionMetadata(
            num_prefills=num_rows,
            num_prefill_tokens=size,
            slot_mapping=inputs.slot_mapping[:size],
            cu_seqlens_q=inputs.cu_seqlens_q[: num_rows + 1],
            context_lens=inputs.context_lens[:num_rows],
            block_tables=inputs.block_tables[:num_rows],
            prefill_workspace=self._workspace,
        )
        plan_prefill(self._workspace, attention.cu_seqlens_q, attention.context_lens)
        hidden_in = None if self._hidden_in is None else self._hidden_in[:size].clone()  # which a pass overwrites
        return model.forward(inputs.token_ids[:size], inputs.positions[:size], kv_pool, attention, hidden_in)


def _products(model: Llama | Opt) -> Callable[[int, int], object]:
    """Runs the products of a layer, of one layer after the other, on that many random rows."""
    weights = [linear.weight for linear in model.layers[0].linears()]
    inputs = [torch.randn(MAX_NUM_TOKENS, w.shape[1], dtype=w.dtype, device=w.device) for w in weights]

    def run(round_: int, num_rows: int) -> None:
        layer = model.layers[round_ % len(model.layers)]
        for linear, x in zip(layer.linears(), inputs, strict=True):
            linear.without_bias(x[:num_rows])

    return run


_NO_TOKENS: dict[str, Array] = {  # a step that is padding alone
    "token_ids": np.zeros(0, dtype=np.int64),
    "positions": np.zeros(0, dtype=np.int64),
    "slot_mapping": np.zeros(0, dtype=np.int64),
    "cu_seqlens_q": np.zeros(1, dtype=np.int32),
    "context_lens": np.zeros(0, dtype=np.int32),
    "block_tables": np.zeros((0, 0), dtype=np.int32),
}
