"""From flags to a deployment: defaults by the machine's GPUs, and errors that name what is wrong."""

from pathlib import Path

import pytest
import torch

from ensemble.errors import ConfigError
from tests.checkpoints import make_tiny_llama
from tools.server.deployment import make_deployment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


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
    assert deployment.num_prompt_tokens_beside == 2048


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
