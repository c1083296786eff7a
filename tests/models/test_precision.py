"""Half precision against single: log-probabilities of 512 tokens that the model itself generates.

A real model on the CPU; random ones of all architectures there and on a GPU, where the Triton kernels compute them.
"""

import random

import pytest
import torch

from ensemble.config import Deployment, ModelConfig
from ensemble.engine.engine import load_engine
from ensemble.engine.model_runner import load_model
from ensemble.models.layers import AttentionMetadata
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import make_tiny_llama, make_tiny_opt, make_tiny_qwen3
from tools.offline import generate

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]
BLOCK_SIZE = 16
PROMPTS = ["The history of France", "Once upon a time", "Photosynthesis is", "def quicksort(numbers):"]
NUM_OUTPUT_TOKENS = 128
BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.03}  # of the mean absolute difference to float32


@pytest.fixture(scope="module")
def texts(smollm2_dir):
    tokenizer = Tokenizer.from_dir(smollm2_dir)
    return with_greedy_continuation(smollm2_dir, [tokenizer.encode(prompt) for prompt in PROMPTS])


def with_greedy_continuation(path, prompts):
    """Prompts with what the model says to them in float32."""
    stage = {"devices": ["cpu"], "kv_cache_bytes": 64 << 20}
    deployment = Deployment.parse({"model": {"path": path, "dtype": "float32"}, "prefill": stage, "decode": stage})
    sampling = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    requests = [Request(request_id=i, prompt_token_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    done = generate(load_engine(deployment, deployment.decode, CPU), requests)
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


@pytest.fixture(scope="module", params=["llama", "qwen3", "opt"])
def random_model(request, tmp_path_factory):
    """A checkpoint whose heads the GPU kernels take, and prompts with their continuation."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_tiny_llama(path, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    elif request.param == "qwen3":
        make_tiny_qwen3(
            path, hidden_size=256, head_dim=64, use_sliding_window=True, sliding_window=50, max_window_layers=1
        )
    else:
        make_tiny_opt(path, hidden_size=256, num_attention_heads=4, word_embed_proj_dim=256)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 380) for _ in range(length)] for length in (2, 15, 16, 60)]
    return path, with_greedy_continuation(path, prompts)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_all_architectures_in_half_precision(random_model, dtype, device):
    """As close as transformers, which on the random LLaMA passes the bound for bf16 itself (0.033 on a CPU)."""
    path, texts = random_model
    exact = transformers_log_probs(path, texts, torch.float32)
    ours = (our_log_probs(path, texts, dtype, device).cpu() - exact).abs().mean().item()
    theirs = (transformers_log_probs(path, texts, dtype, device).cpu() - exact).abs().mean().item()
    assert exact.shape == (512,)
    assert 0 < ours <= 1.25 * theirs


@torch.inference_mode()
def our_log_probs(path, texts, dtype, device=CPU):  # [512]
    """Of each output token, after one prefill of all texts."""
    spec = load_model_spec(path)
    model = load_model(spec, ModelConfig(path=path), device, dtype)
    lens = [len(text) for text in texts]
    max_blocks = -(-max(lens) // BLOCK_SIZE)
    block_tables = torch.arange(len(texts) * max_blocks, dtype=torch.int32).view(len(texts), max_blocks)
    slots = torch.arange(block_tables.numel() * BLOCK_SIZE).view(len(texts), -1)
    metadata = AttentionMetadata(
        num_prefills=len(lens),
        num_prefill_tokens=sum(lens),
        slot_mapping=torch.cat([row[:length] for row, length in zip(slots, lens, strict=True)]).to(device),
        cu_seqlens_q=torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=block_tables.to(device),
    )
    pool_shape = (block_tables.numel(), spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    token_ids = torch.cat([torch.tensor(text) for text in texts]).to(device)
    positions = torch.cat([torch.arange(length) for length in lens]).to(device)
    hidden = model.forward(token_ids, positions, torch.zeros(pool_shape, dtype=dtype, device=device), metadata)
    ends = [sum(lens[: index + 1]) for index in range(len(lens))]
    rows = torch.cat([torch.arange(end - NUM_OUTPUT_TOKENS - 1, end - 1) for end in ends]).to(device)
    return of_next_token(model.compute_logits(hidden[rows]), token_ids[rows + 1])


@torch.inference_mode()
def transformers_log_probs(path, texts, dtype, device=CPU):  # [512]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    parts = []
    for text in texts:
        logits = model(torch.tensor([text], device=device)).logits[0, -NUM_OUTPUT_TOKENS - 1 : -1]
        parts.append(of_next_token(logits, torch.tensor(text[-NUM_OUTPUT_TOKENS:], device=device)))
    return torch.cat(parts)


def of_next_token(logits, token_ids):  # [n, vocab_size], [n] -> [n]
    return logits.float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
