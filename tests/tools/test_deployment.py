"""From flags to a deployment: defaults by the machine's GPUs, and errors that name what is wrong."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from tests.checkpoints import make_tiny_llama
from tools.server.degrees import parse_degrees, rank_map
from tools.server.deployment import make_deployment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("tools.server.deployment.count_gpus", lambda: count)


@pytest.mark.parametrize(
    ("num_gpus", "prefill", "decode", "share", "roles"),
    [
        (0, ["cpu"], ["cpu"], 0.45, "fixed"),
        (1, ["cuda:0"], ["cuda:0"], 0.45, "fixed"),
        (2, ["cuda:0"], ["cuda:1"], 0.9, "auto"),
        (5, ["cuda:0", "cuda:1"], ["cuda:2", "cuda:3", "cuda:4"], 0.9, "auto"),
    ],
)
def test_default_devices(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    prefill: list[str],
    decode: list[str],
    share: float,
    roles: str,
) -> None:
    with_gpus(monkeypatch, num_gpus)
    deployment = make_deployment({"model.path": model})
    assert (deployment.prefill.devices, deployment.decode.devices) == (prefill, decode)
    assert deployment.prefill.gpu_memory_utilization == pytest.approx(share)
    assert deployment.scheduler.roles == roles
    assert make_deployment({"model.path": model, "scheduler.roles": "fixed"}).scheduler.roles == "fixed"


@pytest.mark.parametrize(("num_gpus", "devices"), [(0, ["cpu"]), (2, ["cuda:0", "cuda:1"])])
def test_colocated_takes_every_gpu(
    model: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, devices: list[str]
) -> None:
    with_gpus(monkeypatch, num_gpus)
    deployment = make_deployment({"model.path": model, "mode": "colocated"})
    assert (deployment.prefill.devices, deployment.decode.devices) == ([], devices)
    assert deployment.decode.gpu_memory_utilization == pytest.approx(0.9)
    assert deployment.num_prompt_tokens_beside == 1024


@pytest.mark.parametrize(
    ("num_gpus", "prefill", "decode"),
    [
        (0, "cpu cpu", "cpu,cpu cpu,cpu"),
        (4, "cuda:0 cuda:1", "cuda:0,cuda:1 cuda:2,cuda:3"),  # too few for both: each side from the first on
        (6, "cuda:0 cuda:1", "cuda:2,cuda:3 cuda:4,cuda:5"),
    ],
)
def test_ranks_and_replicas(
    model: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, prefill: str, decode: str
) -> None:
    with_gpus(monkeypatch, num_gpus)
    fields = {"model.path": model} | {f"decode.{name}": n for name, n in parse_degrees("decode", "pp=2").items()}
    deployment = make_deployment(fields, num_replicas={"prefill": 2, "decode": 2})
    assert (deployment.prefill.replicas, deployment.decode.replicas) == (prefill.split(), decode.split())
    lines = rank_map(deployment, load_model_spec(model), dict.fromkeys(range(4), 100))
    assert len(lines) == 6
    device, num_tokens = decode.split()[0].split(",")[1], 100 * deployment.block_size
    part = f"decode replica 2, rank 1 on {device}: layers 1-1, query heads 0-3"
    assert lines[3] == f"{part}, {num_tokens * 2 * 2 * 16 * 4 / 2**20:,.0f} MiB of KV for {num_tokens:,} tokens"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tp=3", "prefill.tensor_parallel_size = 3"),
        ("pp=3", "prefill.pipeline_parallel_size = 3: the model has 2 layers"),
        ("pp=2,layers=2+1", r"prefill.pipeline_layers = \[2, 1\]: the model's 2 layers are needed in all"),
        ("pp=2,layers=2", r"prefill.pipeline_layers = \[2\]: a number for each of pipeline_parallel_size = 2"),
        ("layers=1+1", r"prefill.pipeline_layers = \[1, 1\]: a number for each of pipeline_parallel_size = 1"),
    ],
)
def test_degrees_of_which_the_model_has_no_parts(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    with_gpus(monkeypatch, 0)
    degrees = {f"prefill.{name}": value for name, value in parse_degrees("prefill", words).items()}
    with pytest.raises(ConfigError, match=message):
        make_deployment({"model.path": model, **degrees})


@pytest.mark.parametrize(
    "words", ["tp=0", "tp", "dp=2", "tp=2,tensor-parallel-size=4", "replicas=x", "pp=1+1", "layers=1+", "layers=0+2"]
)
def test_words_that_say_nothing(words: str) -> None:
    with pytest.raises(ConfigError, match="is none of tp=N, pp=N, layers=N"):
        parse_degrees("decode", words)


def test_a_split_of_layers_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a flag, and in the map of the ranks."""
    model = make_tiny_llama(tmp_path, num_hidden_layers=5)
    with_gpus(monkeypatch, 0)
    words = parse_degrees("decode", "pp=3,layers=1+3+1")
    deployment = make_deployment({"model.path": model} | {f"decode.{name}": value for name, value in words.items()})
    lines = rank_map(deployment, load_model_spec(model), dict.fromkeys(range(2), 100))
    assert [line.partition("layers ")[2].partition(",")[0] for line in lines] == ["0-4", "0-0", "1-3", "4-4"]


def test_distserve_s_words_are_answered_with_ours() -> None:
    flag = "--context-tensor-parallel-size"
    done = subprocess.run([sys.executable, "-m", "tools.serve", flag, "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'error: {flag}: here it is --prefill "tp=N" (make serve PREFILL="tp=N")\n'


def test_workers_divide_the_gpus_they_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3)
    fields = {"model.path": model, "prefill.devices": ["cuda:0"], "decode.devices": ["cuda:0", "cuda:0", "cuda:2"]}
    assert make_deployment(fields).decode.gpu_memory_utilization == pytest.approx(0.3)
    fields["prefill.devices"] = ["cuda:1"]
    assert make_deployment(fields).prefill.gpu_memory_utilization == pytest.approx(0.9)


def test_flags_go_over_the_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    file = tmp_path / "deployment.yaml"
    file.write_text(
        f"model: {{path: {model}, dtype: float64}}\nprefill: {{devices: [cpu, cpu]}}\n"
        "decode: {devices: [cpu], max_num_seqs: 7}\nblock_size: 32\n"
    )
    deployment = make_deployment({"decode.max_num_seqs": 9, "model.dtype": None}, file)
    assert deployment.decode.max_num_seqs == 9
    assert deployment.model.dtype == "float64"
    assert deployment.prefill.num_replicas == 2
    assert deployment.block_size == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 12}, "a power of two is needed"),
        ({"prefill.devices": ["gpu"]}, "prefill.devices.0 = 'gpu'"),
        ({"decode.devices": ["cuda:1"]}, "device cuda:1: this machine has 1"),
        ({"mode": "colocated", "prefill.devices": ["cpu"]}, "prefill.devices = ['cpu']: mode = colocated"),
        ({"mode": "mixed"}, "mode = 'mixed'"),
        ({"scheduler.roles": "shifting"}, "scheduler.roles = 'shifting'"),
        ({"scheduler.itl_target_ms": 0}, "scheduler.itl_target_ms = 0"),
        ({"scheduler.min_prefill_replicas": 3, "scheduler.max_prefill_replicas": 2}, "max_prefill_replicas = 2"),
        ({"prefill.devices": []}, "prefill.devices = []"),
        ({"decode.devices": []}, "decode.devices = []"),
        ({"model.path": "/no such model"}, "/no such model: no such directory"),
        ({"model.max_model_len": 10**6}, "max_model_len = 1000000"),
        ({"decode.gpu_memory_utilization": 1.5}, "decode.gpu_memory_utilization = 1.5"),
    ],
)
def test_errors_name_the_field(
    model: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], message: str
) -> None:
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError) as caught:
        make_deployment({"model.path": model, **fields})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_devices_of_a_ray_cluster_are_not_looked_for_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fields = {"model.path": model, "launcher": "ray", "prefill.devices": ["cuda:6"], "decode.devices": ["cuda:7"]}
    assert make_deployment(fields).launcher == "ray"


def test_without_ray_one_line_says_what_to_do(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        make_deployment({"model.path": model, "launcher": "ray"})
