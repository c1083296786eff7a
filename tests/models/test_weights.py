"""Loading: every published form of a checkpoint gives the same model; what does not fit is named."""

import json

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_opt
from safetensors.torch import load_file, save_file

from ensemble.config import ModelConfig
from ensemble.engine.model_runner import load_model
from ensemble.errors import ModelError
from ensemble.models.spec import load_model_spec

CPU = torch.device("cpu")


def load_tiny_model(path, dtype=torch.float64, **config):
    return load_model(load_model_spec(path), ModelConfig(path=path, **config), CPU, dtype)


def load(path, dtype=torch.float64, **config):
    return dict(load_tiny_model(path, dtype, **config).named_weights())


def rewrite(path, change):
    """Replaces the checkpoint by `change` of its tensors."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name].to(weight.dtype)), name


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
def test_weights_are_those_of_the_file(tmp_path, make):
    weights = load(make(tmp_path))
    assert_same(weights, load_file(tmp_path / "model.safetensors"))


def test_shards_are_read_through_the_index(tmp_path):
    make_tiny_llama(tmp_path / "one")
    make_tiny_llama(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path / "many"), load(tmp_path / "one"))


@pytest.mark.parametrize("removed", ["model.", "model.decoder."])
def test_opt_checkpoints_without_prefix_are_read(tmp_path, removed):
    expected = load(make_tiny_opt(tmp_path))
    rewrite(tmp_path, lambda tensors: {name.removeprefix(removed): tensor for name, tensor in tensors.items()})
    assert_same(load(tmp_path), expected)


def test_weights_are_converted_to_the_model_s_dtype(tmp_path):
    make_tiny_llama(tmp_path)
    halves = load(tmp_path, torch.bfloat16)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(halves[name], tensor.bfloat16()), name


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
def test_single_precision_products_are_those_of_double_precision(tmp_path, make):
    """On a CPU the weights of float32 models are kept in another order."""
    make(tmp_path, **({"attention_bias": True} if make is make_tiny_llama else {"word_embed_proj_dim": 32}))
    single, double = load_tiny_model(tmp_path, torch.float32), load_tiny_model(tmp_path, torch.float64)
    assert len(single.linears()) == len(double.linears()) >= 9
    for ours, exact in zip(single.linears(), double.linears(), strict=True):
        x = torch.randn(5, exact.weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(ours(x.float()), exact(x).float(), rtol=1e-5, atol=1e-5)


def test_a_missing_weight_is_named(tmp_path):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n})
    with pytest.raises(ModelError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_named(tmp_path):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 63)})
    with pytest.raises(ModelError, match=r"k_proj\.weight in model\.safetensors has shape \(32, 63\).*\(32, 64\)"):
        load(tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_named_in_one_line(tmp_path):
    make_tiny_llama(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    (tmp_path / shard).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=f"{shard} cannot be read") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / shard).unlink()
    with pytest.raises(ModelError, match=f"{shard} cannot be read"):
        load(tmp_path)
    index.write_text("{}")
    with pytest.raises(ModelError, match="weights cannot be read"):
        load(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match="has neither"):
        load(tmp_path)


def test_dummy_weights_need_no_file_and_are_a_function_of_seed_and_name(tmp_path):
    make_tiny_llama(tmp_path / "a", seed=1)
    make_tiny_llama(tmp_path / "b", seed=2, num_hidden_layers=3)
    for path in (tmp_path / "a", tmp_path / "b"):
        (path / "model.safetensors").unlink()
    weights, deeper = load(tmp_path / "a", load_format="dummy"), load(tmp_path / "b", load_format="dummy")
    assert_same(weights, {name: deeper[name] for name in weights})
    other = load(tmp_path / "a", load_format="dummy", seed=1)
    assert not any(torch.equal(other[name], weight) for name, weight in weights.items())
    distinct = {weight.flatten()[:8].numpy().tobytes() for weight in weights.values()}
    assert len(distinct) == len(weights)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.02)
