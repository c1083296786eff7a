"""Half precision against single, on a real model: log-probabilities of 512 tokens that it generates."""

import pytest
import torch

from ensemble.config import Deployment, ModelConfig
from ensemble.engine.engine import load_engine
from ensemble.engine.model_runner import load_model
from ensemble.models.layers import AttentionMetadata
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from ensemble.tokenizer import Tokenizer
from tools.offline import generate

CPU = torch.device("cpu")
BLOCK_SIZE = 16
PROMPTS = ["The history of France", "Once upon a time", "Photosynthesis is", "def quicksort(numbers):"]
NUM_OUTPUT_TOKENS = 128
BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.03}  # of the mean absolute difference to float32


@pytest.fixture(scope="module")
def texts(smollm2_dir):
    """Prompts with their greedy continuation in float32."""
    stage = {"devices": ["cpu"], "kv_cache_bytes": 64 << 20}
    model = {"path": smollm2_dir, "dtype": "float32"}
    deployment = Deployment.parse({"model": model, "prefill": stage, "decode": stage})
    engine, tokenizer = load_engine(deployment, deployment.decode, CPU), Tokenizer.from_dir(smollm2_dir)
    sampling = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [Request(request_id=i, prompt_token_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    done = generate(engine, requests)
    return [prompt + done[index].output_token_ids for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def exact(smollm2_dir, texts):
    return our_log_probs(smollm2_dir, texts, torch.float32)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_half_precision_is_as_close_to_single_as_it_can_be(smollm2_dir, texts, exact, dtype):
    """Within the bounds; and, since bounds depend on the text, as close as transformers is in that dtype."""
    ours = (our_log_probs(smollm2_dir, texts, dtype) - exact).abs().mean().item()
    theirs = (transformers_log_probs(smollm2_dir, texts, dtype) - exact).abs().mean().item()
    assert exact.shape == (512,)
    assert 0 < ours <= BOUNDS[dtype]
    assert ours <= 1.25 * theirs


@torch.inference_mode()
def our_log_probs(path, texts, dtype):  # [512]
    """Of each output token, after one prefill of all texts."""
    spec = load_model_spec(path)
    model = load_model(spec, ModelConfig(path=path), CPU, dtype)
    lens = [len(text) for text in texts]
    max_blocks = -(-max(lens) // BLOCK_SIZE)
    block_tables = torch.arange(len(texts) * max_blocks, dtype=torch.int32).view(len(texts), max_blocks)
    slots = torch.arange(block_tables.numel() * BLOCK_SIZE).view(len(texts), -1)
    metadata = AttentionMetadata(
        num_prefill_tokens=sum(lens),
        max_seqlen_q=max(lens),
        slot_mapping=torch.cat([row[:length] for row, length in zip(slots, lens, strict=True)]),
        cu_seqlens_q=torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        context_lens=torch.tensor(lens, dtype=torch.int32),
        block_tables=block_tables,
    )
    pool_shape = (block_tables.numel(), spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    token_ids = torch.cat([torch.tensor(text) for text in texts])
    positions = torch.cat([torch.arange(length) for length in lens])
    hidden = model.forward(token_ids, positions, torch.zeros(pool_shape, dtype=dtype), metadata)
    ends = [sum(lens[: index + 1]) for index in range(len(lens))]
    rows = torch.cat([torch.arange(end - NUM_OUTPUT_TOKENS - 1, end - 1) for end in ends])
    return of_next_token(model.compute_logits(hidden[rows]), token_ids[rows + 1])


@torch.inference_mode()
def transformers_log_probs(path, texts, dtype):  # [512]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    parts = []
    for text in texts:
        logits = model(torch.tensor([text])).logits[0, -NUM_OUTPUT_TOKENS - 1 : -1]
        parts.append(of_next_token(logits, torch.tensor(text[-NUM_OUTPUT_TOKENS:])))
    return torch.cat(parts)


def of_next_token(logits, token_ids):  # [n, vocab_size], [n] -> [n]
    return logits.float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
