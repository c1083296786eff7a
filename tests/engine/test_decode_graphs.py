"""Decode steps as CUDA graphs: the same inputs, the same tokens, and neither compilation nor waiting once warm."""

import random

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_opt
from comparison import assert_same_step

from ensemble.cache.block_copier import NUM_PROGRAMS, make_copier
from ensemble.config import ModelConfig
from ensemble.engine.batch import Batch, PrefillRow, prepare_step
from ensemble.engine.decode_graphs import DecodeInputs, graph_batch_sizes
from ensemble.engine.model_runner import ModelRunner, load_model
from ensemble.engine.staging import Staging
from ensemble.engine.step_handle import StepHandle
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams, Sequence

BLOCK_SIZE = 16
MAX_MODEL_LEN = 256
MAX_NUM_SEQS = 20


def make_sequence(rng: random.Random, request_id: int, sampling: SamplingParams, num_blocks: int = 64) -> Sequence:
    prompt = [rng.randrange(3, 384) for _ in range(rng.randint(1, 100))]
    request = Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
    return Sequence(request, block_ids=rng.sample(range(num_blocks), -(-request.max_num_tokens // BLOCK_SIZE)))


def test_inputs_are_those_of_an_ordinary_step_and_padding_touches_nothing():
    """Over steps in which rows come, go, change places and get other blocks."""
    rng = random.Random(0)
    cpu = torch.device("cpu")
    inputs = DecodeInputs(MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE, cpu)
    sequences = [make_sequence(rng, index, SamplingParams(max_tokens=100)) for index in range(30)]
    for sequence in sequences:
        sequence.output_token_ids.append(rng.randrange(384))
    for _ in range(30):
        decodes = rng.sample(sequences, rng.randint(1, 17))
        unread = {s.request_id: row for row, s in enumerate(rng.sample(decodes, len(decodes) // 2))}
        sampled_before = torch.randint(384, (max(len(unread), 1),))
        inputs.fill(decodes, unread, sampled_before, padded_size=MAX_NUM_SEQS, staging=Staging(cpu))

        step = prepare_step(Batch(decodes=decodes), BLOCK_SIZE, {}, Staging(cpu), unread)
        if step.unread is not None:
            step.unread.fill(step.token_ids, sampled_before)
        num_rows = len(decodes)
        assert torch.equal(inputs.token_ids[:num_rows], step.token_ids)
        assert torch.equal(inputs.positions[:num_rows], step.positions)
        assert torch.equal(inputs.slot_mapping[:num_rows], step.attention.slot_mapping)
        assert torch.equal(inputs.context_lens[:num_rows], step.attention.context_lens)
        for row, context_len in enumerate(step.attention.context_lens.tolist()):
            num_blocks = -(-context_len // BLOCK_SIZE)
            assert torch.equal(inputs.block_tables[row, :num_blocks], step.attention.block_tables[row, :num_blocks])
        assert (inputs.slot_mapping[num_rows:MAX_NUM_SEQS] == -1).all()
        assert (inputs.context_lens[num_rows:MAX_NUM_SEQS] == 0).all()
        changed = rng.choice(sequences)
        changed.output_token_ids.append(rng.randrange(384))
        rng.shuffle(changed.block_ids)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 100, 256])
def test_every_batch_has_a_graph_of_its_size_or_little_above(max_num_seqs):
    sizes = graph_batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for num_rows in range(1, max_num_seqs + 1):
        size = min(size for size in sizes if size >= num_rows)
        assert size < 2 * num_rows or size - num_rows < 32


@pytest.fixture(scope="module", params=["llama", "opt"])
def warm_runner(request, tmp_path_factory) -> ModelRunner:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_tiny_llama(path, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    else:
        make_tiny_opt(path, hidden_size=256, num_attention_heads=4, word_embed_proj_dim=256)
    spec, device = load_model_spec(path), torch.device("cuda", 0)
    model = load_model(spec, ModelConfig(path=path), device, torch.float32)
    shape = (1024, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    runner = ModelRunner(model, torch.zeros(shape, dtype=torch.float32, device=device), BLOCK_SIZE)
    runner.warm_up(MAX_NUM_SEQS, max_num_batched_tokens=512, max_model_len=MAX_MODEL_LEN)
    return runner


def mixed_sequences(num_sequences: int) -> list[Sequence]:
    rng = random.Random(1)
    kinds = [
        SamplingParams(max_tokens=24, temperature=0),
        SamplingParams(max_tokens=24, temperature=0.8, top_k=40, seed=5),
        SamplingParams(max_tokens=24, top_p=0.9, min_p=0.02, min_tokens=3, seed=6),
        SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.2),
    ]
    blocks = list(range(1024))
    rng.shuffle(blocks)
    sequences = [make_sequence(rng, index, kinds[index % len(kinds)]) for index in range(num_sequences)]
    for sequence in sequences:
        sequence.block_ids = [blocks.pop() for _ in sequence.block_ids]
    return sequences


def generate(runner: ModelRunner, sequences: list[Sequence], is_ahead: bool) -> list[list[int]]:
    """Prefill one by one, then decode together; the number of rows shrinks at the end."""

    def read() -> None:
        for sequence, token_id in zip(waiting[0], waiting[1].token_ids(), strict=True):
            sequence.append(token_id, frozenset())

    for sequence in sequences:
        (token_id,) = runner.run(Batch(prefills=[PrefillRow(sequence, 0, sequence.prompt_len)]))
        sequence.append(token_id, frozenset())
    waiting = None
    for step in range(23):
        rows = sequences[step % len(sequences) :] if step > 15 else sequences
        batch = Batch(decodes=rows)
        handle = runner.launch(batch)
        if waiting is not None:
            read()
        waiting = rows, handle
        if not is_ahead:
            read()
            waiting = None
    if waiting is not None:
        read()
    return [sequence.output_token_ids for sequence in sequences]


@pytest.mark.gpu
@pytest.mark.parametrize("num_sequences", [1, 3, 8, 17, 20])
def test_graphs_give_the_tokens_of_eager_steps(warm_runner, recorded, num_sequences):
    graphed = generate(warm_runner, mixed_sequences(num_sequences), is_ahead=False)
    assert generate(warm_runner, mixed_sequences(num_sequences), is_ahead=True) == graphed
    recorded.clear()

    class Both:
        """Each step by graphs, and eagerly after the same tokens."""

        eager = ModelRunner(warm_runner.model, warm_runner.kv_pool, BLOCK_SIZE)

        def run(self, batch: Batch) -> list[int]:
            return self.launch(batch).token_ids()

        def launch(self, batch: Batch) -> StepHandle:
            expected = self.eager.run(batch)
            handle = warm_runner.launch(batch)
            assert_same_step(recorded.pop(), handle.token_ids(), recorded.pop(), expected, batch.sampled)
            return handle

    assert generate(Both(), mixed_sequences(num_sequences), is_ahead=False) == graphed


@pytest.mark.gpu
def test_once_warm_a_launch_neither_compiles_nor_waits(warm_runner):
    import triton

    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    generate(warm_runner, mixed_sequences(7), is_ahead=True)
    torch.cuda.synchronize()
    rng = random.Random(2)
    prefills = [make_sequence(rng, 100 + index, SamplingParams(max_tokens=8, seed=index)) for index in range(3)]
    decodes = mixed_sequences(5)
    for sequence in decodes:
        sequence.output_token_ids.append(5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [
            warm_runner.launch(Batch(prefills=[PrefillRow(s, 0, s.prompt_len) for s in prefills], decodes=decodes)),
            warm_runner.launch(Batch(decodes=decodes)),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = None
    for handle in handles:
        handle.token_ids()
    assert compiled == []


@pytest.mark.gpu
def test_once_warm_a_copy_of_blocks_neither_compiles_nor_waits(warm_runner):
    """Hand-offs, swaps and cached blocks are copied by a kernel where they lie scattered."""
    import triton

    pool = warm_runner.kv_pool
    host = torch.zeros(40, *pool.shape[1:], dtype=pool.dtype, pin_memory=True)
    copier = make_copier(pool.device, min_run_bytes=1 << 40)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (9, 10, 16, NUM_PROGRAMS, NUM_PROGRAMS + 1):
            block_ids = list(range(count, 0, -1))
            copies = [copier.start(pool, host, block_ids, block_ids), copier.start(host, pool, block_ids, block_ids)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = None
    torch.cuda.synchronize()
    assert all(copy.is_done() for copy in copies)
    assert compiled == []
