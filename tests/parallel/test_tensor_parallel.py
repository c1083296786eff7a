"""Ranks, each a thread with a gloo group of its own, against one process: the same tokens, exactly, in float64."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore

from ensemble.config import Deployment, ModelConfig
from ensemble.engine.engine import load_engine
from ensemble.engine.model_runner import Model, ModelRunner, load_model
from ensemble.errors import ConfigError, InternalError
from ensemble.models.spec import load_model_spec
from ensemble.parallel.group import Group
from ensemble.parallel.tensor_parallel import SINGLE, TensorParallel, connect
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama, make_tiny_opt, make_tiny_qwen3
from tests.engine.test_model_runner import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    make_sequences,
    random_prompts,
    run_at_random,
    run_whole,
)
from tools.offline import generate

CPU = torch.device("cpu")
SIX_HEADS = {"num_attention_heads": 6, "hidden_size": 96}
CHECKPOINTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "opt": (make_tiny_opt, SIX_HEADS | {"word_embed_proj_dim": 96}),
    "opt-350m": (make_tiny_opt, SIX_HEADS | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    # of 3 ranks, which have two query heads each, the second one's belong to different KV heads
    "llama-2-kv-heads": (make_tiny_llama, SIX_HEADS | {"num_key_value_heads": 2}),
    "llama-1-kv-head": (make_tiny_llama, SIX_HEADS | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": (
        make_tiny_llama,
        SIX_HEADS | {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True, "intermediate_size": 97},
    ),
    "qwen3": (make_tiny_qwen3, SIX_HEADS | {"num_key_value_heads": 3, "vocab_size": 384}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models: several threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Path:
    make, overrides = CHECKPOINTS[request.param]
    return make(tmp_path_factory.mktemp(request.param), **overrides)


def on_ranks(size: int, function: Callable[[TensorParallel], Any]) -> list[Any]:
    """What `function` returns on each rank of a group."""
    store, results = HashStore(), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            results[rank] = function(connect(store, rank, size, CPU, timeout_s=20))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[rank] for rank in range(size)]


def make_runner(path: Path, parallel: TensorParallel) -> ModelRunner:
    model = load_model(load_model_spec(path), ModelConfig(path=path), CPU, torch.float64, parallel)
    spec = model.spec
    pool_shape = (NUM_BLOCKS, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return ModelRunner(model, torch.full(pool_shape, torch.nan, dtype=torch.float64), BLOCK_SIZE)


def run(path: Path, parallel: TensorParallel) -> list[list[int]]:
    """Greedy and sampled tokens of prompts run whole, and in random chunks beside decode rows."""
    runner = make_runner(path, parallel)
    prompts = random_prompts(runner.model.spec.vocab_size)
    sampling = [
        SamplingParams(max_tokens=8, temperature=0.9, top_k=50, seed=index) if index % 2 else
        SamplingParams(max_tokens=8, temperature=0)
        for index in range(len(prompts))
    ]  # fmt: skip
    whole, mixed = make_sequences(prompts, sampling), make_sequences(prompts, sampling, seed=1)
    run_whole(runner, whole)
    run_at_random(runner, mixed, seed=1)
    return [sequence.output_token_ids for sequence in whole + mixed]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return run(checkpoint, SINGLE)


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gives_the_tokens_of_one_process(checkpoint, expected, size):
    assert on_ranks(size, lambda parallel: run(checkpoint, parallel)) == [expected] * size


def assembled(models: list[Model]) -> dict[str, Tensor]:
    """The checkpoint's tensors, put together from every rank's parts of them."""
    tensors: dict[str, Tensor] = {}
    for model in models:
        for name, values, shape, start in model.named_weights():
            whole = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
            part = whole[tuple(slice(first, first + n) for first, n in zip(start, values.shape, strict=True))]
            assert torch.equal(part[~part.isnan()], values[~part.isnan()]), "two ranks differ in a part of both"
            part.copy_(values)
    return tensors


def load_ranks(path: Path, size: int, **config: Any) -> list[Model]:
    """Loading needs no peer."""
    spec, parallels = load_model_spec(path), [TensorParallel(rank, size) for rank in range(size)]
    return [load_model(spec, ModelConfig(path=path, **config), CPU, torch.float64, each) for each in parallels]


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_ranks_parts_make_up_the_checkpoint(checkpoint, size):
    models = load_ranks(checkpoint, size)
    tensors, stored = assembled(models), load_file(checkpoint / "model.safetensors")
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, stored[name].double()), name


@pytest.mark.parametrize("size", [2, 3, 6])
def test_dummy_weights_are_parts_of_the_same_tensors_for_every_degree(checkpoint, size):
    expected = assembled(load_ranks(checkpoint, 1, load_format="dummy"))
    tensors = assembled(load_ranks(checkpoint, size, load_format="dummy"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_rank_reads_its_own_part_of_each_file(checkpoint, monkeypatch):
    """Counted where tensors are read: the parts of two ranks are hardly more than one process reads."""
    read = 0
    from ensemble.models import checkpoint as module

    original = module._Safetensors.read

    def count(self, key, part):
        nonlocal read
        values = original(self, key, part)
        read += values.nbytes
        return values

    monkeypatch.setattr(module._Safetensors, "read", count)
    load_ranks(checkpoint, 1)
    of_one, read = read, 0
    load_ranks(checkpoint, 2)
    assert of_one < read < 1.4 * of_one, "of these tiny models a rank holds all norms, positions and some KV heads"


def test_an_engine_has_the_pool_of_its_rank_s_heads(tmp_path):
    """As many blocks on every rank, by the rank with room for the fewest."""
    path = make_tiny_llama(tmp_path, **SIX_HEADS, num_key_value_heads=2)
    requests = [
        Request(request_id=index, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=8, temperature=0))
        for index, prompt in enumerate(random_prompts(384))
    ]

    def generate_on(parallel: TensorParallel) -> tuple[int, int, list[list[int]]]:
        stage = {"devices": ["cpu"], "kv_cache_bytes": (1 << 20) * (3 - parallel.rank)}
        deployment = Deployment.parse(
            {"model": {"path": path, "dtype": "float64"}, "prefill": stage, "decode": stage, "block_size": 8}
        )
        engine = load_engine(deployment, deployment.decode, CPU, Group(parallel))
        done = generate(engine, requests, max_num_batched_tokens=24)
        outputs = [done[index].output_token_ids for index in range(len(requests))]
        return engine.pool.layout.num_kv_heads, engine.pool.num_blocks, outputs

    ((heads, _, expected),) = on_ranks(1, generate_on)
    assert heads == 2
    (first, first_blocks, outputs), (second, second_blocks, others) = on_ranks(2, generate_on)
    assert (first, second) == (1, 1)
    assert first_blocks == second_blocks
    assert outputs == others == expected


@pytest.mark.parametrize(("size", "message"), [(4, "divisor of the 6 query heads"), (12, "divisor of the 6")])
def test_a_degree_that_does_not_divide_the_heads_is_refused(checkpoint, size, message):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size = {size}: a {message}"):
        load_ranks(checkpoint, size)


def test_columns_of_unequal_width_are_gathered_and_sums_have_the_same_bits():
    torch.manual_seed(0)
    parts = [torch.randn(5, width, dtype=torch.float64) for width in (3, 2, 4)]
    terms = [torch.randn(7, 11) for _ in range(3)]

    def both(parallel: TensorParallel) -> tuple[Tensor, Tensor]:
        gathered = parallel.all_gather(parts[parallel.rank], [3, 2, 4])
        return gathered, parallel.all_reduce(terms[parallel.rank].clone())

    results = on_ranks(3, both)
    for gathered, total in results:
        assert torch.equal(gathered, torch.cat(parts, dim=1))
        assert torch.equal(total, results[0][1])
        torch.testing.assert_close(total, sum(terms))
    assert on_ranks(3, lambda parallel: parallel.smallest(5 - parallel.rank)) == [3, 3, 3]


def test_a_peer_that_does_not_come_or_is_gone_is_an_error_that_names_the_rank():
    with pytest.raises(InternalError, match="rank 1 of 2: cannot meet its peers"):
        connect(HashStore(), 1, 2, CPU, timeout_s=0.2)

    def leave_early(parallel: TensorParallel) -> None:
        if parallel.rank == 1:
            parallel.all_reduce(torch.zeros(1))

    with pytest.raises(InternalError, match="rank 1 of 2: a peer is gone"):
        on_ranks(2, leave_early)
    with pytest.raises(ConfigError, match="rank = 2"):
        connect(HashStore(), 2, 2, CPU)
