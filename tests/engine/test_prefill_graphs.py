"""Short steps with prompts as CUDA graphs: the inputs of eager steps, and their tokens."""

import random

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_opt
from comparison import assert_same_step
from torch import Tensor

from ensemble.config import ModelConfig
from ensemble.engine.batch import Batch, PrefillRow, token_arrays
from ensemble.engine.model_runner import ModelRunner, load_model
from ensemble.engine.prefill_graphs import PrefillGraphs, PrefillInputs
from ensemble.engine.staging import Staging
from ensemble.models.layers import AttentionMetadata
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams, Sequence

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 512, 512


def make_batch(rng: random.Random, num_prompts: int, num_decodes: int, longest: int = 60) -> Batch:
    """Prompts, some of them in their second chunk, and running sequences."""
    blocks = list(range(NUM_BLOCKS))
    rng.shuffle(blocks)

    def make_sequence(request_id: int) -> Sequence:
        prompt = [rng.randrange(3, 380) for _ in range(rng.randint(2, longest))]
        request = Request(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(temperature=0))
        return Sequence(request, block_ids=[blocks.pop() for _ in range(-(-(longest + 8) // BLOCK_SIZE))])

    prefills = []
    for index in range(num_prompts):
        sequence = make_sequence(index)
        start = rng.choice([0, sequence.prompt_len // 2])
        prefills.append(PrefillRow(sequence, start, sequence.prompt_len - start))
    decodes = [make_sequence(100 + index) for index in range(num_decodes)]
    for sequence in decodes:
        sequence.output_token_ids.append(rng.randrange(380))
    return Batch(prefills, decodes)


def test_padded_inputs_give_the_hidden_states_of_the_step(tmp_path):
    """On the CPU, without a graph: the tensors that a graph reads, over steps of changing sizes."""
    path = make_tiny_llama(tmp_path / "model")
    spec, cpu = load_model_spec(path), torch.device("cpu")
    model = load_model(spec, ModelConfig(path=path), cpu, torch.float64)
    pool = torch.randn(NUM_BLOCKS, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim).double()
    inputs = PrefillInputs(512, 24, MAX_MODEL_LEN // BLOCK_SIZE, cpu)
    rng = random.Random(0)
    for _ in range(6):
        batch = make_batch(rng, rng.randint(1, 6), rng.choice([0, 3, 12]))
        tokens = token_arrays(batch, BLOCK_SIZE, {})["tokens"]
        num_tokens = len(tokens["token_ids"])
        size = num_tokens + rng.randint(0, 60)
        inputs.fill(tokens, size, Staging(cpu))
        padded = AttentionMetadata(
            num_prefills=24,
            num_prefill_tokens=size,
            slot_mapping=inputs.slot_mapping[:size],
            cu_seqlens_q=inputs.cu_seqlens_q,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
        )
        plain = AttentionMetadata(
            num_prefills=len(batch.prefills),
            num_prefill_tokens=sum(row.length for row in batch.prefills),
            slot_mapping=torch.from_numpy(tokens["slot_mapping"]),
            cu_seqlens_q=torch.from_numpy(tokens["cu_seqlens_q"]),
            context_lens=torch.from_numpy(tokens["context_lens"]),
            block_tables=torch.from_numpy(tokens["block_tables"]),
        )
        pools = pool.clone(), pool.clone()
        graphed = model.forward(inputs.token_ids[:size], inputs.positions[:size], pools[0], padded)
        token_ids, positions = (torch.from_numpy(tokens[name]) for name in ("token_ids", "positions"))
        expected = model.forward(token_ids, positions, pools[1], plain)
        assert torch.allclose(graphed[:num_tokens], expected, rtol=1e-12)
        assert torch.allclose(*pools, rtol=1e-12, atol=1e-12), "padding stores nothing"


@pytest.fixture(scope="module", params=["llama", "opt"])
def runners(request, tmp_path_factory) -> tuple[ModelRunner, ModelRunner]:
    """With graphs, and without, over pools of their own with the same random content."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_tiny_llama(path, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    else:
        make_tiny_opt(path, hidden_size=256, num_attention_heads=4, word_embed_proj_dim=256)
    spec, device = load_model_spec(path), torch.device("cuda", 0)
    model = load_model(spec, ModelConfig(path=path), device, torch.float32)
    pool = torch.randn(NUM_BLOCKS, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim, device=device)
    warm, eager = ModelRunner(model, pool.clone(), BLOCK_SIZE), ModelRunner(model, pool.clone(), BLOCK_SIZE)
    warm.warm_up(24, max_num_batched_tokens=512, max_model_len=MAX_MODEL_LEN)
    warm.kv_pool.copy_(pool)
    return warm, eager


@pytest.mark.gpu
@pytest.mark.parametrize(("num_prompts", "num_decodes"), [(1, 0), (2, 0), (7, 0), (1, 1), (3, 24), (30, 0)])
def test_graphs_give_the_tokens_and_keys_of_eager_and_of_separate_steps(runners, recorded, num_prompts, num_decodes):
    warm, eager = runners
    batch = make_batch(random.Random(num_prompts), num_prompts, num_decodes, longest=60 if num_prompts < 30 else 15)
    graphs = warm._prefill_graphs
    assert isinstance(graphs, PrefillGraphs)
    assert (graphs.size_for(batch) is None) == (num_prompts + num_decodes > 40)
    tokens = warm.run(batch)
    assert_same_step(recorded.pop(), tokens, *step_of(eager, recorded, batch), batch.sampled)
    assert torch.allclose(warm.kv_pool, eager.kv_pool, atol=1e-3)
    parts = [step_of(warm, recorded, Batch(prefills=[row])) for row in batch.prefills]
    parts += [step_of(warm, recorded, Batch(decodes=[sequence])) for sequence in batch.decodes]
    logits, separate = torch.cat([part[0] for part in parts]), [token for part in parts for token in part[1]]
    assert_same_step(logits, separate, *step_of(eager, recorded, batch), batch.sampled)


def step_of(runner: ModelRunner, recorded: list[Tensor], batch: Batch) -> tuple[Tensor, list[int]]:
    tokens = runner.run(batch)
    return recorded.pop(), tokens


@pytest.mark.gpu
def test_once_warm_a_graphed_step_neither_compiles_nor_waits(runners):
    import triton

    warm, _ = runners
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    rng = random.Random(5)
    batches = [make_batch(rng, num_prompts, num_decodes) for num_prompts, num_decodes in [(1, 0), (4, 0), (2, 9)]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [warm.launch(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = None
    for handle in handles:
        handle.token_ids()
    assert compiled == []
