"""Loading: every published form of a checkpoint gives the same model; what does not fit is named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_opt
from safetensors.torch import load_file, save_file

from ensemble.config import Deployment, ModelConfig
from ensemble.engine.engine import load_engine
from ensemble.engine.model_runner import load_model
from ensemble.errors import ModelError
from ensemble.models.checkpoint import Checkpoint
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from tools.offline import generate

CPU = torch.device("cpu")


def load_tiny_model(path, dtype=torch.float64, **config):
    return load_model(load_model_spec(path), ModelConfig(path=path, **config), CPU, dtype)


def load(path, dtype=torch.float64, **config):
    return {weight.name: weight.tensor for weight in load_tiny_model(path, dtype, **config).named_weights()}


def rewrite(path, change):
    """Replaces the checkpoint by `change` of its tensors."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)


def write_bin(path, num_shards=1, is_zip=True):
    """Replaces model.safetensors by what older releases of transformers wrote."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        return
    names = [f"pytorch_model-{index + 1:05d}-of-{num_shards:05d}.bin" for index in range(num_shards)]
    weight_map = {key: names[index % num_shards] for index, key in enumerate(tensors)}
    for name in names:
        shard = {key: tensors[key] for key in tensors if weight_map[key] == name}
        torch.save(shard, path / name, _use_new_zipfile_serialization=is_zip)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
def test_bin_files_are_read_as_safetensors_are(tmp_path, make, num_shards, is_zip):
    expected, expected_tokens = load(make(tmp_path)), greedy_tokens(tmp_path)
    write_bin(tmp_path, num_shards, is_zip)
    assert_same(load(tmp_path), expected)
    assert greedy_tokens(tmp_path) == expected_tokens


def greedy_tokens(path):
    stage = {"devices": ["cpu"], "kv_cache_bytes": 1 << 20}
    model = {"path": path, "dtype": "float64"}
    deployment = Deployment.parse({"model": model, "prefill": stage, "decode": stage})
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    request = Request(request_id=0, prompt_token_ids=[5, 80, 30, 120], sampling=sampling)
    return generate(load_engine(deployment, deployment.decode, CPU), [request])[0].output_token_ids


def copy_of(path, target, *patterns):
    for pattern in patterns:
        for file in path.glob(pattern):
            shutil.copy(file, target)


def test_the_file_that_counts_is_the_one_that_transformers_takes(tmp_path):
    """One complete file before an index, safetensors before .bin; each step takes away what counted before."""
    from transformers import LlamaForCausalLM

    made = [tmp_path / name for name in ("safetensors", "shards", "bin", "bin-shards")]
    for seed, path in enumerate(made):
        make_tiny_llama(path, seed=seed, **({"max_shard_size": "100KB"} if path.name == "shards" else {}))
    write_bin(made[2])
    write_bin(made[3], num_shards=2)
    both = tmp_path / "both"
    both.mkdir()
    for path in made:
        copy_of(path, both, "*.safetensors", "*.bin", "*.index.json", "config.json")
    for path, gone in zip(made, ["model.safetensors", "model*.safetensors*", "pytorch_model.bin", ""], strict=True):
        theirs = LlamaForCausalLM.from_pretrained(both).state_dict()
        assert_same(load(both), theirs)
        assert_same(load(both), load(path))
        for file in both.glob(gone or "*"):
            file.unlink()


def test_a_stale_index_beside_a_complete_file_is_not_read(tmp_path):
    expected = load(make_tiny_llama(tmp_path))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path), expected)


PEAK_WHILE_LOADING = """
import os, sys, threading, torch
from pathlib import Path
from ensemble.models.checkpoint import Checkpoint
from ensemble.models.layers import Weight
from ensemble.models.weights import load_weights

def private_bytes():  # of memory that is no file's
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

def watch():
    while not is_done.wait(0.001):
        samples.append(private_bytes())

weights = {f"weight.{index}": torch.zeros(2048, 2048) for index in range(8)}
samples, is_done = [private_bytes()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    parts = [Weight.whole(name, tensor) for name, tensor in weights.items()]
    load_weights(Checkpoint(Path(sys.argv[1])), parts, torch.device("cpu"), {})
finally:
    is_done.set()
samples.append(private_bytes())
watcher.join()
assert all(weight.eq(1).all() for weight in weights.values())
print(max(samples) - samples[0])
"""


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_takes_no_second_copy_of_the_weights_in_memory(tmp_path, suffix):
    save_file({f"weight.{index}": torch.ones(2048, 2048) for index in range(8)}, tmp_path / "model.safetensors")
    if suffix == "bin":
        write_bin(tmp_path)
    command = [sys.executable, "-c", PEAK_WHILE_LOADING, str(tmp_path)]
    peak = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(peak) < 24 << 20, "the weights are 128 MiB, the largest 16 MiB"


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("stolen",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_pickle_that_would_run_code_is_refused_in_one_line(tmp_path, monkeypatch, num_shards, is_zip):
    monkeypatch.chdir(tmp_path)
    make_tiny_llama(tmp_path)
    write_bin(tmp_path, num_shards)
    file = next(iter(sorted(tmp_path.glob("*.bin"))))
    torch.save(torch.load(file) | {"extra": Malicious()}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ModelError, match=f"{file.name}: refused: it is no pickle of tensors alone") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "stolen").exists()


def logits(path):
    """Of one prompt, by transformers and by us, each with its own reading of the directory."""
    from transformers import AutoModelForCausalLM

    model = load_tiny_model(path)
    hidden = torch.randn(3, model.spec.hidden_size, dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        return theirs.lm_head(hidden), model.compute_logits(hidden), theirs.get_input_embeddings().weight


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
@pytest.mark.parametrize("form", ["embedding-alone", "head-alone", "both-equal", "wider-head", "both-different"])
def test_heads_are_tied_as_transformers_ties_them(tmp_path, make, form):
    make(tmp_path, tie_word_embeddings=True)
    embedding = next(name for name in load_file(tmp_path / "model.safetensors") if "embed_tokens" in name)

    def change(tensors):
        values = tensors[embedding]
        if form == "embedding-alone":
            return tensors
        if form == "head-alone":
            return {name: tensor for name, tensor in tensors.items() if name != embedding} | {"lm_head.weight": values}
        if form == "wider-head":
            return tensors | {"lm_head.weight": values.double()}
        return tensors | {"lm_head.weight": values.clone() + (form == "both-different")}

    rewrite(tmp_path, change)
    theirs, ours, their_embedding = logits(tmp_path)
    torch.testing.assert_close(ours, theirs)
    model = load_tiny_model(tmp_path)
    assert torch.equal(model.embed_tokens.weight, their_embedding)
    assert (model.lm_head.weight is model.embed_tokens.weight) == (form != "both-different")


def test_a_head_that_is_neither_there_nor_tied_is_named(tmp_path):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    assert "weight lm_head.weight is missing" in refusal(tmp_path, "model")


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


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_dtype_is_the_weights_where_config_json_names_none(tmp_path, suffix):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    if suffix == "bin":
        write_bin(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert load_model_spec(tmp_path).dtype == "bfloat16"


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_opt])
def test_single_precision_products_are_those_of_double_precision(tmp_path, make):
    """On a CPU the weights of float32 models are kept in another order."""
    make(tmp_path, **({"attention_bias": True} if make is make_tiny_llama else {"word_embed_proj_dim": 32}))
    single, double = load_tiny_model(tmp_path, torch.float32), load_tiny_model(tmp_path, torch.float64)
    assert len(single.linears()) == len(double.linears()) >= 9
    for ours, exact in zip(single.linears(), double.linears(), strict=True):
        x = torch.randn(5, exact.weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(ours(x.float()), exact(x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_missing_weight_is_named(tmp_path, suffix):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n})
    if suffix == "bin":
        write_bin(tmp_path)
    with pytest.raises(ModelError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_of_another_shape_is_named(tmp_path, file):
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 63)})
    if file.endswith("bin"):
        write_bin(tmp_path)
    with pytest.raises(ModelError, match=rf"k_proj\.weight in {file} has shape \(32, 63\).*\(32, 64\)"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_that_cannot_be_read_is_named_in_one_line(tmp_path, suffix):
    make_tiny_llama(tmp_path, **({"max_shard_size": "100KB"} if suffix == "safetensors" else {}))
    if suffix == "bin":
        write_bin(tmp_path, num_shards=3)
    index = next(tmp_path.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / sorted(weight_map.values())[0]
    others = {key: file for key, file in weight_map.items() if file != shard.name}
    index.write_text(json.dumps({"weight_map": weight_map | {next(iter(others)): shard.name}}))
    assert next(iter(others)) in refusal(tmp_path, shard.name)
    for content in (b"no tensors", shard.read_bytes()[:-50], b""):
        shard.write_bytes(content)
        assert f"{shard}: cannot be read: " in refusal(tmp_path, shard.name)
    shard.unlink()
    assert f"{shard}: cannot be read: " in refusal(tmp_path, shard.name)
    for content in ("{}", "[]", "{", '{"weight_map": 1}'):
        index.write_text(content)
        assert f"{index}: cannot be read: " in refusal(tmp_path, index.name)
    index.unlink()
    assert "has neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path, "model path")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.fp16.safetensors", "model.fp16.safetensors is a variant, which is not looked for"),
        ("model-q8_0.gguf", "holds a GGUF model"),
        ("tf_model.h5", "holds TensorFlow weights alone"),
        ("flax_model.msgpack", "holds Flax weights alone"),
        ("adapter_config.json", "holds an adapter"),
    ],
)
def test_weights_of_another_kind_are_named(tmp_path, file, message):
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert message in refusal(tmp_path, "model path")


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path, file):
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if "-of-" in file:
        stem, _, suffix = file.partition("-00001-of-00002")
        (tmp_path / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n")
    if "-of-" in file:
        with pytest.raises(ModelError, match="is a git-lfs pointer"):
            Checkpoint(tmp_path).tensor("lm_head.weight")
    else:
        assert f"{file}: is a git-lfs pointer, not the file itself: run `git lfs pull`" in refusal(tmp_path, file)


def test_weights_that_are_no_floating_point_numbers_are_named(tmp_path):
    make_tiny_llama(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    assert f"weight {name} in model.safetensors is of dtype int8: not supported" in refusal(tmp_path, "model")


def refusal(path, named):
    with pytest.raises(ModelError, match=named) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_bin_file_without_names_is_refused(tmp_path):
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    assert "holds a list" in refusal(tmp_path, "pytorch_model.bin")


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
