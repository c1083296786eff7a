"""Decode steps as CUDA graphs: the launches of a whole forward pass replayed by one call.

A graph is captured for each of a few batch sizes; a batch takes the next larger one and pads. A padding row has slot
-1, so that it stores nothing, and context length 0, so that it reads nothing. All graphs read the same input buffer:

    host buffer --one copy of its used part--> device buffer --views--> every graph
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ensemble.engine.sampler import Unread
from ensemble.engine.staging import Staging
from ensemble.models.layers import AttentionMetadata
from ensemble.models.llama import Llama
from ensemble.models.opt import Opt
from ensemble.request import Sequence
from kernels.decode_plan import decode_workspace, plan_decode


def graph_batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes to capture. Up to 64 rows a padding row costs hardly any time, since the weights are read anyway."""
    steps = [1, 2, 4, 8, 16, 32, 48, 64, *range(96, max_num_seqs, 32)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class DecodeInputs:
    """The inputs of up to `max_num_seqs` decode rows, in one buffer on the host and one on the device.

    Rows of block tables stay from step to step on the host; only those that changed are written again.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        rows = -(-max_num_seqs // 4) * 4  # keeps every section aligned to 16 bytes
        width = -(-max_blocks // 4) * 4
        self._tables_start = rows * (5 * 2 + 1)  # in int32 words: five int64 sections and one of int32
        num_words = self._tables_start + rows * width
        self._host = np.zeros(num_words, dtype=np.int32)
        self._device = torch.zeros(num_words, dtype=torch.int32, device=device)

        wide = self._host[: rows * 10].view(np.int64).reshape(5, rows)
        self._token_ids, self._positions, self._slots, self._unread_slots, self._unread_sources = wide
        self._context_lens = self._host[rows * 10 : self._tables_start]
        self._block_tables = self._host[self._tables_start :].reshape(rows, width)
        self._block_ids: list[list[int]] = [[] for _ in range(rows)]  # what the rows of _block_tables hold

        wide_on_device = self._device[: rows * 10].view(torch.int64).view(5, rows)
        self.token_ids, self.positions, self.slot_mapping, self._device_slots, self._device_sources = wide_on_device
        self.context_lens = self._device[rows * 10 : self._tables_start]
        self.block_tables = self._device[self._tables_start :].view(rows, width)

    def fill(
        self,
        decodes: list[Sequence],
        unread_rows: Mapping[int, int],
        sampled_before: Tensor | None,
        padded_size: int,
        staging: Staging,
    ) -> None:
        """Brings a batch to the device, padded. `unread_rows` maps request_id to a row of `sampled_before`."""
        num_rows = len(decodes)
        for row, sequence in enumerate(decodes):
            if self._block_ids[row] != sequence.block_ids:
                self._block_ids[row] = list(sequence.block_ids)
                self._block_tables[row, : len(sequence.block_ids)] = sequence.block_ids
        context_lens = self._context_lens[:num_rows]
        context_lens[:] = [sequence.num_tokens + (sequence.request_id in unread_rows) for sequence in decodes]
        positions = self._positions[:num_rows]
        np.subtract(context_lens, 1, out=positions)
        blocks = self._block_tables[np.arange(num_rows), positions // self.block_size]
        self._slots[:num_rows] = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        self._token_ids[:num_rows] = [sequence.last_token_id for sequence in decodes]
        self._slots[num_rows:padded_size] = -1
        for section in (self._context_lens, self._positions, self._token_ids):
            section[num_rows:padded_size] = 0

        unread = [(row, unread_rows[s.request_id]) for row, s in enumerate(decodes) if s.request_id in unread_rows]
        if unread:
            self._unread_slots[: len(unread)], self._unread_sources[: len(unread)] = zip(*unread, strict=True)
        num_words = self._tables_start + num_rows * self._block_tables.shape[1]
        staging.upload(self._host[:num_words], self._device[:num_words])
        if unread and sampled_before is not None:
            slots, sources = self._device_slots[: len(unread)], self._device_sources[: len(unread)]
            Unread(slots, sources).fill(self.token_ids, sampled_before)


class DecodeGraphs:
    """The graphs of one model over one KV pool. Capture runs every size once, which also compiles its kernels.

    Of a place of a pipeline: hidden states of the place before come in, and those for the next place go out.
    """

    def __init__(
        self, model: Llama | Opt, kv_pool: Tensor, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        device, spec = kv_pool.device, model.spec
        self._inputs = DecodeInputs(max_num_seqs, -(-max_model_len // block_size), block_size, device)
        self._workspace = decode_workspace(max_num_seqs, spec.num_heads, spec.num_kv_heads, spec.head_dim, device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._sizes = graph_batch_sizes(max_num_seqs)
        self._hidden_in = None
        if model.first_layer > 0:
            self._hidden_in = torch.zeros(max_num_seqs, spec.hidden_size, dtype=kv_pool.dtype, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        memory = None
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            staging = Staging(device)
            self._inputs.fill([], {}, None, size, staging)
            self._logits(model, kv_pool, size)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # NCCL's watchdog calls too
                logits = self._logits(model, kv_pool, size)
            memory = memory or graph.pool()
            self._graphs[size] = graph, logits

    @property
    def max_num_seqs(self) -> int:
        return self._sizes[-1]

    def run(
        self,
        decodes: list[Sequence],
        unread_rows: Mapping[int, int],
        sampled_before: Tensor | None,
        staging: Staging,
        hidden_in: Tensor | None = None,  # [len(decodes), hidden_size], of the place before
    ) -> Tensor:  # [len(decodes), vocab_size], or [len(decodes), hidden_size] for the next place; until the next run
        """Launches one step of at most `max_num_seqs` rows and returns the logits to come."""
        size = next(size for size in self._sizes if size >= len(decodes))
        self._inputs.fill(decodes, unread_rows, sampled_before, size, staging)
        if hidden_in is not None and self._hidden_in is not None:
            self._hidden_in[: len(decodes)].copy_(hidden_in)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(decodes)]

    def _logits(self, model: Llama | Opt, kv_pool: Tensor, size: int) -> Tensor:
        inputs = self._inputs
        attention = AttentionMetadata(
            num_prefills=0,
            num_prefill_tokens=0,
            slot_mapping=inputs.slot_mapping[:size],
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=inputs.context_lens[:size],
            block_tables=inputs.block_tables[:size],
            decode_workspace=self._workspace,
        )
        plan_decode(self._workspace, attention.context_lens)
        hidden_in = None if self._hidden_in is None else self._hidden_in[:size].clone()  # which a pass overwrites
        hidden = model.forward(inputs.token_ids[:size], inputs.positions[:size], kv_pool, attention, hidden_in)
        return hidden if model.lm_head is None else model.compute_logits(hidden)
