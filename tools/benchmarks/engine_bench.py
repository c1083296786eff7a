"""A model of a published shape with dummy weights on one GPU, whose steps are timed."""

import random
import time
from statistics import median

import torch

from ensemble.config import GPU_BLOCK_SIZE, ModelConfig
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.model_runner import ModelRunner, load_model
from ensemble.engine.step_handle import StepHandle
from ensemble.models.layers import Linear
from ensemble.request import Request, SamplingParams, Sequence
from tools.benchmarks.engine_shapes import SHAPES, load_spec

NUM_STEPS = 64
MIXED_PREFIX_LEN, MIXED_CONTEXT_LEN = 1024, 2000  # before the chunk of a mixed step, and of each decode row
MAX_NUM_BATCHED_TOKENS = 8192
RESERVE_BYTES = 6 << 30  # activations of the largest prefill, graphs, workspaces


class Bench:
    """One model on the current GPU, with as large a KV pool as fits."""

    def __init__(self, name: str, ceilings: dict[str, float], batch_sizes: tuple[int, ...]) -> None:
        self.name, self.shape, self.ceilings, self.batch_sizes = name, SHAPES[name], ceilings, batch_sizes
        device = torch.device("cuda", torch.cuda.current_device())
        start = time.perf_counter()
        self.spec = load_spec(self.shape.config)
        config = ModelConfig(path=self.spec.path, load_format="dummy")
        self.model = load_model(self.spec, config, device, torch.float16)
        block_shape = (self.spec.num_layers, 2, self.spec.num_kv_heads, GPU_BLOCK_SIZE, self.spec.head_dim)
        self.kv_bytes_per_token = 2 * self.spec.num_layers * 2 * self.spec.num_kv_heads * self.spec.head_dim
        free_bytes = torch.cuda.mem_get_info()[0] - RESERVE_BYTES
        self.num_blocks = free_bytes // (self.kv_bytes_per_token * GPU_BLOCK_SIZE)
        kv_pool = torch.empty((self.num_blocks, *block_shape), dtype=torch.float16, device=device).normal_()
        self.runner = ModelRunner(self.model, kv_pool, GPU_BLOCK_SIZE)
        self.runner.warm_up(max(batch_sizes), MAX_NUM_BATCHED_TOKENS, self.spec.max_model_len)
        torch.cuda.synchronize()
        self.ready_s = time.perf_counter() - start

    def fits(self, batch_size: int, num_tokens: int) -> bool:
        return num_tokens < self.spec.max_model_len and self.blocks_for(num_tokens) * batch_size <= self.num_blocks

    def mixed_batch(self, chunk: int, num_decodes: int) -> Batch:
        """A chunk that does not end its prompt, beside decode rows."""
        sequences = self.make_sequences(num_decodes + 1, MIXED_CONTEXT_LEN, MIXED_CONTEXT_LEN)
        sequences[0].output_token_ids.clear()
        return Batch([PrefillRow(sequences[0], MIXED_PREFIX_LEN, chunk)], sequences[1:])

    def time_host_ms(self, sequences: list[Sequence]) -> float:
        """Median time of launching a decode step, once it has run a few times; each step has run before the next."""
        times_ms = []
        for _ in range(8):
            start = time.perf_counter()
            handle = self.runner.launch(Batch(decodes=sequences))
            times_ms.append((time.perf_counter() - start) * 1e3)
            commit(sequences, handle.token_ids())
        return median(times_ms[3:])

    def time_decode_ms(self, batch_size: int, prompt_len: int) -> float:
        return self.time_ahead_ms(Batch(decodes=self.make_sequences(batch_size, prompt_len, prompt_len)), NUM_STEPS)

    def time_ahead_ms(self, batch: Batch, num_steps: int) -> float:
        """Mean over steps of the same rows, each launched before the tokens of the one before it are read."""
        commit(batch.sampled, self.runner.run(batch))
        before: StepHandle | None = None
        start = time.perf_counter()
        for _ in range(num_steps):
            handle = self.runner.launch(batch)
            if before is not None:
                commit(batch.sampled, before.token_ids())
            before = handle
        assert before is not None
        before.token_ids()
        return (time.perf_counter() - start) / num_steps * 1e3

    def time_device_ms(self, batch: Batch) -> float:
        """Two steps whose launches wait behind a pause of the GPU's."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)
        start.record()
        first, second = (self.runner.launch(batch) for _ in range(2))
        end.record()
        for handle in (first, second):
            handle.token_ids()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms / 2

    def time_prefill_ms(self, batch_size: int, prompt_len: int) -> tuple[float, float]:
        """The whole step, and the host's part of it: until it has been launched."""
        sequences = self.make_sequences(batch_size, prompt_len, 0)
        start = time.perf_counter()
        handle = self.runner.launch(Batch(prefills=[PrefillRow(sequence, 0, prompt_len) for sequence in sequences]))
        launched = time.perf_counter()
        handle.token_ids()
        return (time.perf_counter() - start) * 1e3, (launched - start) * 1e3

    def make_sequences(self, batch_size: int, prompt_len: int, num_computed_tokens: int) -> list[Sequence]:
        """Sequences over shuffled blocks; those that are prefilled have one token of output."""
        blocks = random.sample(range(self.num_blocks), batch_size * self.blocks_for(prompt_len + NUM_STEPS))
        sampling = SamplingParams(max_tokens=2 * NUM_STEPS, temperature=0)
        sequences = []
        for index in range(batch_size):
            prompt = random.choices(range(self.spec.vocab_size), k=prompt_len)
            request = Request(request_id=index, prompt_token_ids=prompt, sampling=sampling)
            output = [1] if num_computed_tokens else []
            block_ids = blocks[index::batch_size]
            sequences.append(Sequence(request, output, num_computed_tokens, block_ids))
        return sequences

    def blocks_for(self, num_tokens: int) -> int:
        return -(-(num_tokens + 2) // GPU_BLOCK_SIZE)

    @property
    def head(self) -> Linear:
        """The output projection."""
        assert self.model.lm_head is not None
        return self.model.lm_head

    def weight_bytes(self) -> int:
        """Of all weights but the tables that a step takes only a few rows from."""
        total = sum(each.tensor.nbytes for each in self.model.named_weights() if "embed" not in each.name)
        return total + (self.head.weight.nbytes if self.spec.tie_word_embeddings else 0)

    def prefill_flops(self, batch_size: int, prompt_len: int) -> float:
        """Matrix products and the causal half of attention; the output projection for one token of each prompt."""
        head = self.head.weight.numel()
        weights = sum(linear.weight.numel() for linear in self.model.linears()) - head
        attention = 2 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * prompt_len
        return batch_size * (prompt_len * (2 * weights + attention) + 2 * head)

    def mixed_floor_ms(self, chunk: int, num_decodes: int) -> float:
        head = self.head.weight.numel()
        weights = sum(linear.weight.numel() for linear in self.model.linears()) - head
        products = 2 * weights * (chunk + num_decodes) + 2 * head * num_decodes
        context_lens = MIXED_PREFIX_LEN + num_decodes * MIXED_CONTEXT_LEN
        pairs = chunk * (MIXED_PREFIX_LEN + chunk / 2) + num_decodes * MIXED_CONTEXT_LEN
        attention = 4 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * pairs
        byte_rate, flop_rate = self.ceilings["bytes"], self.ceilings["flops"]
        seconds = max(self.weight_bytes() / byte_rate, products / flop_rate)
        return (seconds + context_lens * self.kv_bytes_per_token / byte_rate + attention / flop_rate) * 1e3


def commit(sequences: list[Sequence], token_ids: list[int]) -> None:
    for sequence, token_id in zip(sequences, token_ids, strict=True):
        sequence.append(token_id, frozenset())
