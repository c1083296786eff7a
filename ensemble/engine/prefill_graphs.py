"""Short steps with prompts as CUDA graphs: up to about 1,000 tokens the launches of a forward pass take the host longer
than the GPU.

A graph is captured for each of a few token counts; a batch takes the next larger one and pads. A padding token has slot
-1 and belongs to no sequence; a padding row is a sequence without queries. Decode rows, in a step with both, are
sequences of one query. What is done for the sampled tokens alone comes after the graph.

    host buffer --one copy of its used part--> device buffer --views--> every graph
"""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ensemble.engine.batch import Batch
from ensemble.engine.sampler import Unread
from ensemble.engine.staging import Array, Staging
from ensemble.models.layers import AttentionMetadata
from ensemble.models.llama import Llama
from ensemble.models.opt import Opt

TOKENS_PER_PROMPT = 32  # of a graph, at least: each sequence it may have costs programs that find nothing to do
MAX_DECODE_LEN = 4096  # one program reads a decode row's context for each KV head; eager steps split longer ones


def graph_token_counts(max_num_tokens: int) -> list[int]:
    """Counts to capture, up to 1,024 tokens: from there on an eager step's launches are ahead of the GPU."""
    counts = [16, 32, *range(64, 512, 64), *range(512, 1025, 128)]
    largest = min(max_num_tokens, counts[-1])
    return [count for count in counts if count < largest] + [largest]


Kind: TypeAlias = tuple[int, bool]  # of a graph: its tokens, and whether it is for decode rows too


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
        starts = tokens["cu_seqlens_q"]
        self._cu_seqlens[: len(starts)] = starts
        self._cu_seqlens[len(starts) : num_rows + 1] = np.arange(starts[-1] + 1, num_tokens + 1)  # decode rows
        self._cu_seqlens[num_rows + 1 :] = num_tokens
        self._context_lens[:num_rows] = tokens["context_lens"]
        self._context_lens[num_rows:] = 0
        self._block_tables[:num_rows, : tokens["block_tables"].shape[1]] = tokens["block_tables"]
        num_words = self._tables_start + num_rows * self._block_tables.shape[1]
        staging.upload(self._host[:num_words], self._device[:num_words])


class PrefillGraphs:
    """The graphs of one model over one KV pool: for prompts alone, and for up to `max_num_decodes` decode rows beside.

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
    ) -> None:
        device = kv_pool.device
        self._max_num_decodes = max_num_decodes
        sizes = graph_token_counts(max_num_tokens)
        max_num_rows, max_blocks = self._num_rows(sizes[-1], max_num_decodes > 0), -(-max_model_len // block_size)
        self._inputs = PrefillInputs(sizes[-1], max_num_rows, max_blocks, device)
        self._graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        kinds = [(size, is_mixed) for is_mixed in ([False, True] if max_num_decodes else [False]) for size in sizes]
        memory = None
        for size, is_mixed in sorted(kinds, reverse=True):  # the largest first: the others fit into its memory
            staging = Staging(device)
            self._inputs.fill(_NO_TOKENS, size, staging)
            self._forward(model, kv_pool, size, is_mixed)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                hidden = self._forward(model, kv_pool, size, is_mixed)
            memory = memory or graph.pool()
            self._graphs[size, is_mixed] = graph, hidden

    def kind_for(self, batch: Batch) -> Kind | None:
        """The smallest graph that has room for this step with prompts; None if there is none."""
        num_decodes = len(batch.decodes)
        num_tokens = sum(row.length for row in batch.prefills) + num_decodes
        num_rows, is_mixed = len(batch.prefills) + num_decodes, num_decodes > 0
        if num_decodes > self._max_num_decodes or any(each.num_tokens > MAX_DECODE_LEN for each in batch.decodes):
            return None
        for kind in reversed(self._graphs):
            if kind[1] == is_mixed and kind[0] >= num_tokens and self._num_rows(*kind) >= num_rows:
                return kind
        return None

    def run(
        self, kind: Kind, arrays: dict[str, dict[str, Array]], sampled_before: Tensor | None, staging: Staging
    ) -> Tensor:  # [>= T, hidden_size], until the next run
        """Launches a step (`batch.token_arrays`) and returns the hidden states to come, in the order of its tokens."""
        self._inputs.fill(arrays["tokens"], kind[0], staging)
        if "unread" in arrays and sampled_before is not None:
            unread = staging.to_device({"unread": arrays["unread"]})["unread"]
            Unread(**unread).fill(self._inputs.token_ids, sampled_before)
        graph, hidden = self._graphs[kind]
        graph.replay()
        return hidden

    def _num_rows(self, size: int, is_mixed: bool) -> int:
        """Sequences of a graph."""
        return max(2, size // TOKENS_PER_PROMPT) + (self._max_num_decodes if is_mixed else 0)

    def _forward(self, model: Llama | Opt, kv_pool: Tensor, size: int, is_mixed: bool) -> Tensor:
        inputs, num_rows = self._inputs, self._num_rows(size, is_mixed)
        attention = AttentionMetadata(
            num_prefill_tokens=size,
            max_seqlen_q=size,
            slot_mapping=inputs.slot_mapping[:size],
            cu_seqlens_q=inputs.cu_seqlens_q[: num_rows + 1],
            context_lens=inputs.context_lens[:num_rows],
            block_tables=inputs.block_tables[:num_rows],
        )
        return model.forward(inputs.token_ids[:size], inputs.positions[:size], kv_pool, attention)


_NO_TOKENS: dict[str, Array] = {  # a step that is padding alone
    "token_ids": np.zeros(0, dtype=np.int64),
    "positions": np.zeros(0, dtype=np.int64),
    "slot_mapping": np.zeros(0, dtype=np.int64),
    "cu_seqlens_q": np.zeros(1, dtype=np.int32),
    "context_lens": np.zeros(0, dtype=np.int32),
    "block_tables": np.zeros((0, 0), dtype=np.int32),
}
