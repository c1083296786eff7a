"""`ModelRunner`: runs batches on one device. It reads sequences and never changes them; the engine commits tokens."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ensemble.config import ModelConfig
from ensemble.engine.batch import Batch, PrefillRow, StepInput, prepare_step, token_arrays
from ensemble.engine.decode_graphs import DecodeGraphs
from ensemble.engine.log_probs import asked_rows
from ensemble.engine.penalties import PenaltyTables
from ensemble.engine.prefill_graphs import PrefillGraphs
from ensemble.engine.sampler import sample_tokens, sampling_arrays, sampling_input
from ensemble.engine.staging import Staging
from ensemble.engine.step_handle import BetweenPlaces, StepHandle
from ensemble.models.checkpoint import Checkpoint
from ensemble.models.layers import AttentionMetadata
from ensemble.models.llama import Llama
from ensemble.models.opt import Opt
from ensemble.models.spec import ModelSpec, dtype_of
from ensemble.models.weights import EMBEDDINGS, HEAD, fill_with_random_weights, load_weights, with_true_ties
from ensemble.parallel.group import ALONE, Group
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel
from ensemble.request import Request, SamplingParams, Sequence
from kernels.block_copy import copy_blocks
from kernels.decode_plan import decode_workspace, plan_decode
from kernels.gather_rows import gather_rows
from kernels.prefill_plan import plan_prefill, prefill_workspace

Model = Llama | Opt


def resolve_dtype(model_config: ModelConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype the model runs in."""
    dtype: torch.dtype = getattr(torch, dtype_of(spec, model_config.dtype, device.type))
    return dtype


def load_model(
    spec: ModelSpec,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    parallel: TensorParallel = SINGLE,
    layers: range | None = None,  # of its place in a pipeline
) -> Model:
    """Builds a rank's part of the model on the device and fills its weights.

    Raises ModelError naming a weight that does not fit, ConfigError for a degree of which the model has no parts.
    """
    checkpoint = None if model_config.load_format == "dummy" else Checkpoint(spec.path)
    if checkpoint is not None:
        spec = with_true_ties(spec, checkpoint)
    max_positions = model_config.max_model_len or spec.max_model_len
    model_class = Llama if spec.architecture == "llama" else Opt
    model = model_class(spec, max_positions, partial(torch.empty, device=device, dtype=dtype), parallel, layers)
    if checkpoint is None:
        fill_with_random_weights(model.named_weights(), model_config.seed, device)
    else:
        stand_ins = {EMBEDDINGS[spec.architecture]: HEAD} if spec.tie_word_embeddings else {}
        load_weights(checkpoint, model.named_weights(), device, stand_ins)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what loading took on the way, whole tensors of which a part was wanted among it
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        for linear in model.linears():
            linear.pack()
    return model


class ModelRunner:
    """Runs one model over one KV pool, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.

    In a pipeline each place runs its layers: hidden states come from the place before and go to the next one, and the
    last place samples, and sends the tokens to all.
    """

    def __init__(self, model: Model, kv_pool: Tensor, block_size: int, group: Group = ALONE) -> None:
        self.model = model
        self._group = group
        self._pipeline = group.pipeline
        self._num_steps = 0
        self.while_waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # on a CPU, for another place
        self._token_stream = None
        if kv_pool.is_cuda and not self._pipeline.is_last:
            self._token_stream = torch.cuda.Stream(kv_pool.device)
        self.kv_pool = kv_pool
        self.block_size = block_size
        self._decode_graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._penalty_tables = PenaltyTables(model.spec.vocab_size, kv_pool.device)
        self._last: StepHandle | None = None

    def run(self, batch: Batch) -> list[int]:
        """Runs a step: `launch` and `token_ids` in one."""
        return self.launch(batch).token_ids()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> StepHandle:
        """Starts a step that gives one token to each of `batch.sampled`; on a GPU it returns ahead of the step.

        A row's sequence holds enough blocks for the step's tokens; a decode row's KV is complete but for its last
        token, whose keys and values this step stores. Tokens that are read are committed to their sequences before
        the next launch. The step before may be unread: its tokens are then taken on the device, and a sequence that
        they turn out to end has run one step too many, which its blocks must allow for.
        """
        before = self._last if self._last is not None and not self._last.is_read else None
        if self._pipeline.size > 1:
            before = None  # a sequence is in one step at a time
        unread_rows, sampled_before = (before.rows, before.sampled) if before is not None else ({}, None)
        self._num_steps += 1
        staging = Staging(self.kv_pool.device)
        hidden_in = self._receive_hidden(batch)
        if not self._pipeline.is_last:
            self._last = self._launch_for_next_place(batch, hidden_in, staging)
            return self._last
        decode_graphs, prefill_graphs, tables = self._decode_graphs, self._prefill_graphs, self._penalty_tables
        eos_token_ids = self.model.spec.eos_token_ids
        if decode_graphs is not None and not batch.prefills and len(batch.decodes) <= decode_graphs.max_num_seqs:
            logits = decode_graphs.run(batch.decodes, unread_rows, sampled_before, staging, hidden_in)
            arrays = sampling_arrays(batch.decodes, eos_token_ids, tables, unread_rows)
            sampling = sampling_input(staging.to_device(arrays))
        elif prefill_graphs is not None and (size := prefill_graphs.size_for(batch)) is not None:
            arrays = token_arrays(batch, self.block_size, unread_rows)
            hidden = prefill_graphs.run(size, arrays, sampled_before, staging, hidden_in)
            last = {"last": {"tokens": arrays["tokens"]["sampled_tokens"]}}
            sampled_arrays = sampling_arrays(batch.sampled, eos_token_ids, tables, unread_rows)
            tensors = staging.to_device(last | sampled_arrays)
            logits, sampling = self._logits(hidden, tensors["last"]["tokens"]), sampling_input(tensors)
        else:
            sampled_arrays = sampling_arrays(batch.sampled, eos_token_ids, tables, unread_rows)
            step = prepare_step(batch, self.block_size, sampled_arrays, staging, unread_rows)
            hidden = self._forward(step, sampled_before, hidden_in)
            logits, sampling = self._logits(hidden, step.sampled_tokens), step.sampling
        log_probs = None
        if logits.shape[0] > 0:
            asked = asked_rows(logits, sampling.asked, batch.sampled) if sampling.asked is not None else None
            sampled = sample_tokens(logits, sampling, tables, sampled_before)
            if asked is not None:
                log_probs = asked.to_host(sampled, batch.sampled, staging)
        else:
            sampled = self._no_tokens(batch)
        sent = [] if self._pipeline.is_first else [self._pipeline.send_tokens(sampled, self._num_steps)]
        self._last = StepHandle(sampled, batch.sampled, staging, log_probs, BetweenPlaces(sent))
        return self._last

    def _no_tokens(self, batch: Batch) -> Tensor:
        """[S] int64; in a pipeline a step without tokens has one all the same, by which its end is told."""
        num_tokens = len(batch.sampled) or int(self._pipeline.size > 1)
        return torch.zeros(num_tokens, dtype=torch.int64, device=self.kv_pool.device)

    def _receive_hidden(self, batch: Batch) -> Tensor | None:
        """[T, hidden_size] of the place before."""
        if self._pipeline.is_first:
            return None
        num_tokens = sum(row.length for row in batch.prefills) + len(batch.decodes)
        dtype, device = self.kv_pool.dtype, self.kv_pool.device
        hidden = torch.empty(num_tokens, self.model.spec.hidden_size, dtype=dtype, device=device)
        coming = self._pipeline.receive_hidden(hidden, self._num_steps)
        with self.while_waiting():
            return coming.wait()

    def _launch_for_next_place(self, batch: Batch, hidden_in: Tensor | None, staging: Staging) -> StepHandle:
        decode_graphs, prefill_graphs = self._decode_graphs, self._prefill_graphs
        num_tokens = sum(row.length for row in batch.prefills) + len(batch.decodes)
        if decode_graphs is not None and not batch.prefills and len(batch.decodes) <= decode_graphs.max_num_seqs:
            hidden = decode_graphs.run(batch.decodes, {}, None, staging, hidden_in).clone()
        elif prefill_graphs is not None and (size := prefill_graphs.size_for(batch)) is not None:
            arrays = token_arrays(batch, self.block_size, {})
            hidden = prefill_graphs.run(size, arrays, None, staging, hidden_in)[:num_tokens].clone()
        else:
            step = prepare_step(batch, self.block_size, {}, staging, {})
            hidden = self._forward(step, None, hidden_in)
        sent, sampled = [self._pipeline.send_hidden(hidden, self._num_steps)], self._no_tokens(batch)
        coming = self._pipeline.receive_tokens(sampled, self._num_steps)
        return StepHandle(
            sampled, batch.sampled, staging, None, BetweenPlaces(sent, coming, self._token_stream, self.while_waiting)
        )

    def _forward(self, step: StepInput, sampled_before: Tensor | None, hidden_in: Tensor | None) -> Tensor:
        """Hidden states of all tokens."""
        if step.unread is not None and sampled_before is not None:
            step.unread.fill(step.token_ids, sampled_before)
        attention = self._with_plan(step.attention) if self.kv_pool.is_cuda else step.attention
        return self.model.forward(step.token_ids, step.positions, self.kv_pool, attention, hidden_in)

    def _logits(self, hidden: Tensor, sampled_tokens: Tensor) -> Tensor:
        if sampled_tokens.shape[0] == 0:
            return hidden[:0]
        return self.model.compute_logits(gather_rows(hidden, sampled_tokens))

    def run_largest(self, max_num_batched_tokens: int, max_model_len: int) -> None:
        """Runs a prefill batch of that many tokens, to see the memory that it takes. Overwrites block 0."""
        longest = min(max_num_batched_tokens, max_model_len - 1)
        self.run(_largest_batch(max_num_batched_tokens, longest, self.block_size))

    def run_every_path(self, max_num_batched_tokens: int, max_model_len: int) -> None:
        """Runs steps of every kind, with no more positions than the model has. Overwrites block 0."""
        batches = _warm_up_batches(max_num_batched_tokens, max_model_len, self.block_size)
        for batch in batches:
            self.run(batch)
        if max_model_len == 2:
            return  # a prompt's token and one of output
        for sequence in batches[-1].decodes:
            sequence.output_token_ids.append(0)
            sequence.block_ids = [0] * -(-sequence.num_tokens // self.block_size)
        self.run(batches[-1])  # one more token of rows with penalties

    def _with_plan(self, attention: AttentionMetadata) -> AttentionMetadata:
        spec, lens, num_tokens = self.model.spec, attention.context_lens, len(attention.slot_mapping)
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if attention.num_prefills == 0:
            decode = decode_workspace(len(lens), *heads, lens.device)
            plan_decode(decode, lens)
            return replace(attention, decode_workspace=decode)
        prefill = prefill_workspace(num_tokens, len(lens), *heads, self.kv_pool.dtype, lens.device)
        plan_prefill(prefill, attention.cu_seqlens_q, lens)
        return replace(attention, prefill_workspace=prefill)

    @torch.inference_mode()
    def warm_up(self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        """Before the first request, on a GPU: compiles every kernel, captures the graphs, takes the memory that the
        largest step needs. Overwrites what is in the pool.
        """
        if self.kv_pool.device.type != "cuda":
            return
        self.run_every_path(max_num_batched_tokens, max_model_len)
        self._decode_graphs = DecodeGraphs(self.model, self.kv_pool, self.block_size, max_num_seqs, max_model_len)
        self._prefill_graphs = PrefillGraphs(
            self.model,
            self.kv_pool,
            self.block_size,
            max_num_batched_tokens,
            max_num_seqs,
            max_model_len,
            self._group.tensor,
        )
        self.run_every_path(max_num_batched_tokens, max_model_len)
        block_ids = torch.zeros(1, dtype=torch.int64, device=self.kv_pool.device)
        copy_blocks(self.kv_pool, self.kv_pool, block_ids, block_ids)  # for hand-offs, swaps and cached blocks


def _warm_up_batches(max_num_batched_tokens: int, max_model_len: int, block_size: int) -> list[Batch]:
    """Batches that between them take every path: chunks, mixed steps, all ways of sampling, the largest step; the last
    one is of rows with penalties.
    """
    sequence = partial(_warm_up_sequence, block_size=block_size)
    longest = max_model_len - 1  # of prompts: a token is to come
    greedy = SamplingParams(max_tokens=2, temperature=0)
    drawn = SamplingParams(max_tokens=2, temperature=1, top_k=5, top_p=0.9, min_p=0.1, min_tokens=2)
    penalised = SamplingParams(max_tokens=2, temperature=0, repetition_penalty=1.1, num_logprobs=1)
    decodes = [
        Batch(decodes=[sequence(max(1, min(7, longest - 1)), sampling, request_id=row) for row in range(num_rows)])
        for sampling in (greedy, drawn, penalised)
        for num_rows in (1, 2, 16, 17, 33)
    ]
    spans = [(0, min(end, longest)) for end in (1, 2, 16, 17)]
    spans.append((min(32, longest) // 2, min(32, longest)))
    chunks = [PrefillRow(sequence(end, greedy), start, end - start) for start, end in spans]
    return [
        _largest_batch(max_num_batched_tokens, min(max_num_batched_tokens, longest), block_size),
        *(Batch(prefills=[chunk]) for chunk in chunks),
        Batch(prefills=chunks, decodes=[sequence(min(16, longest), greedy)]),
        *decodes,
    ]


def _largest_batch(max_num_batched_tokens: int, longest: int, block_size: int) -> Batch:
    greedy = SamplingParams(max_tokens=2, temperature=0)
    sequences = [_warm_up_sequence(longest, greedy, block_size) for _ in range(max_num_batched_tokens // longest)]
    return Batch(prefills=[PrefillRow(sequence, 0, longest) for sequence in sequences])


def _warm_up_sequence(prompt_len: int, sampling: SamplingParams, block_size: int, request_id: int = -1) -> Sequence:
    """A sequence of token 0 in block 0."""
    request = Request(request_id=request_id, prompt_token_ids=[0] * prompt_len, sampling=sampling)
    return Sequence(request, output_token_ids=[0], block_ids=[0] * (-(-(prompt_len + 1) // block_size)))
