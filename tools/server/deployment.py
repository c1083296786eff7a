"""From an operator's flags to a checked `Deployment`."""

import glob
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble.config import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, Deployment, StageName
from ensemble.errors import NO_RAY, ConfigError
from ensemble.models.spec import load_model_spec
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.server.degrees import check_degrees, place_ranks

DEGREES = ("tensor_parallel_size", "pipeline_parallel_size")
GPU_SHARE = 0.9  # of a device's memory, divided among the workers on it


def make_deployment(
    fields: Mapping[str, object | None],
    file: Path | None = None,
    num_replicas: Mapping[StageName, int] | None = None,  # where the devices are not named
) -> Deployment:
    """The deployment of `file`, if given, with `fields` over it and defaults for the model and the devices.

    fields: `section.field` or `field` |-> value; None is "not given". Raises ConfigError in one line.
    """
    raw: dict[str, Any] = {"model": {}, "prefill": {}, "decode": {}, "scheduler": {}, "transfer": {}}
    if file is not None:
        raw |= Deployment.from_yaml(file).model_dump(mode="json", exclude_unset=True)
    for name, value in fields.items():
        if value is not None:
            section, _, field = name.rpartition(".")
            (raw[section] if section else raw)[field] = value
    stages = (raw["prefill"], raw["decode"])
    num_gpus, is_colocated = count_gpus(), raw.get("mode") == "colocated"
    defaults = default_devices(num_gpus, is_colocated)
    if num_replicas or any(degree in stage for stage in stages for degree in DEGREES):
        names: list[StageName] = ["decode"] if is_colocated else ["prefill", "decode"]
        counts = {name: (num_replicas or {}).get(name, 1) for name in names}
        placed = place_ranks({name: raw[name] for name in names}, counts, num_gpus)
        defaults = placed.get("prefill", []), placed["decode"]
    if num_gpus > 1 and not is_colocated:
        raw["scheduler"].setdefault("roles", "auto")
    for stage, devices in zip(stages, defaults, strict=True):
        stage.setdefault("devices", devices)
    on_gpus = any(device.startswith("cuda") for stage in stages for device in stage["devices"])
    raw.setdefault("block_size", GPU_BLOCK_SIZE if on_gpus else CPU_BLOCK_SIZE)
    workers = Counter(device for stage in stages for device in stage["devices"])
    for stage in stages:
        num_sharing = max((workers[device] for device in stage["devices"]), default=1)
        stage.setdefault("gpu_memory_utilization", GPU_SHARE / num_sharing)
    raw["model"].setdefault("path", "")
    deployment = Deployment.parse(raw)  # before a download that a wrong flag would make useless
    if deployment.launcher == "local":
        check_devices(workers, num_gpus)
    elif importlib.util.find_spec("ray") is None:
        raise ConfigError(NO_RAY)
    path = raw["model"]["path"]
    raw["model"]["path"] = resolve_model(path) if path else ensure_default_model()
    deployment = Deployment.parse(raw)
    spec = load_model_spec(deployment.model.path)
    deployment.model.limit_model_len(spec.max_model_len)
    check_degrees(deployment, spec)
    for name, count in (num_replicas or {}).items():
        if deployment.stage(name).num_replicas != count:
            stage_config = deployment.stage(name)
            raise ConfigError(
                f"{name}: replicas = {count}: {len(stage_config.devices)} devices are"
                f" {stage_config.num_replicas} replicas of {stage_config.num_ranks} ranks"
            )
    return deployment


def count_gpus() -> int:
    """CUDA GPUs that torch can use. It is asked, which takes two seconds, only where the system has one."""
    if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):  # which WSL has
        return 0
    import torch

    return torch.cuda.device_count()


def default_devices(num_gpus: int, is_colocated: bool) -> tuple[list[str], list[str]]:
    """Devices of prefill and decode: half of the GPUs each, or both on one; colocated, decode's alone, on every GPU."""
    if is_colocated:
        return [], [f"cuda:{index}" for index in range(num_gpus)] or ["cpu"]
    if num_gpus == 0:
        return ["cpu"], ["cpu"]
    devices = [f"cuda:{index}" for index in range(num_gpus)]
    return devices[: max(1, num_gpus // 2)], devices[num_gpus // 2 :]


def check_devices(devices: Mapping[str, int], num_gpus: int) -> None:
    """Raises ConfigError for a CUDA device that this machine does not have."""
    for device in devices:
        if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= num_gpus:
            raise ConfigError(f"device {device}: this machine has {num_gpus} CUDA GPUs that torch can use")
