"""How many ranks and replicas each side has, as an operator says it: "tp=2,pp=1,replicas=2"; and where they run."""

from collections.abc import Mapping
from typing import Any

from ensemble.config import Deployment, StageName
from ensemble.errors import ConfigError
from ensemble.models.layer_split import split_layers
from ensemble.models.spec import DTYPE_BYTES, ModelSpec, dtype_of
from ensemble.parallel.shares import Rank, share_heads

_WORDS = {  # word |-> field of the stage; replicas: how many, where the devices are not named
    "tp": "tensor_parallel_size",
    "tensor_parallel_size": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "layers": "pipeline_layers",
    "pipeline_layers": "pipeline_layers",
    "replicas": "replicas",
}
_LISTS = ("pipeline_layers",)
# DistServe's flags |-> how the same is said here.
DISTSERVE_FLAGS = {
    "--context-tensor-parallel-size": '--prefill "tp=N" (make serve PREFILL="tp=N")',
    "--context-pipeline-parallel-size": '--prefill "pp=N" (make serve PREFILL="pp=N")',
    "--decoding-tensor-parallel-size": '--decode "tp=N" (make serve DECODE="tp=N")',
    "--decoding-pipeline-parallel-size": '--decode "pp=N" (make serve DECODE="pp=N")',
}


def parse_degrees(side: str, words: str) -> dict[str, Any]:
    """Fields of a stage, and `replicas`, from "pp=2,layers=17+15,replicas=2". Raises ConfigError naming the word."""
    found: dict[str, Any] = {}
    for word in filter(None, words.replace(",", " ").split()):
        name, _, value = word.partition("=")
        field, numbers = _WORDS.get(name.replace("-", "_")), value.split("+")
        is_said = all(number.isdecimal() and int(number) > 0 for number in numbers)
        if field is None or field in found or not is_said or (len(numbers) > 1 and field not in _LISTS):
            raise ConfigError(
                f"{side} = {words!r}: {word!r} is none of tp=N, pp=N, layers=N+N (of each place), replicas=N,"
                " each once, N from 1"
            )
        found[field] = [int(number) for number in numbers] if field in _LISTS else int(value)
    return found


def place_ranks(
    stages: Mapping[StageName, dict[str, Any]],  # fields, without devices where they are to be placed
    num_replicas: Mapping[StageName, int],
    num_gpus: int,
) -> dict[StageName, list[str]]:
    """Devices of the ranks of each side: GPUs of their own where there are enough, else each side from the first on.

    Raises ConfigError where a side alone has more ranks than there are GPUs.
    """
    num_ranks: dict[StageName, int] = {
        name: num_replicas[name] * stage.get("tensor_parallel_size", 1) * stage.get("pipeline_parallel_size", 1)
        for name, stage in stages.items()
    }
    if num_gpus == 0:
        return {name: ["cpu"] * count for name, count in num_ranks.items()}
    for name, count in num_ranks.items():
        if count > num_gpus:
            raise ConfigError(f"{name}: {count} ranks in all need a GPU each, this machine has {num_gpus}")
    fits = sum(num_ranks.values()) <= num_gpus
    devices: dict[StageName, list[str]] = {}
    first = 0
    for name, count in num_ranks.items():
        devices[name] = [f"cuda:{index}" for index in range(first, first + count)]
        first += count if fits else 0
    return devices


def check_degrees(deployment: Deployment, spec: ModelSpec) -> None:
    """Raises ConfigError for a degree of which the model has no parts, by the name of the side."""
    for name, stage in (("prefill", deployment.prefill), ("decode", deployment.decode)):
        try:
            share_heads(spec.num_heads, spec.num_kv_heads, Rank(0, stage.tensor_parallel_size))
            split_layers(spec, stage)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from None


def rank_map(deployment: Deployment, spec: ModelSpec, num_blocks: Mapping[int, int]) -> list[str]:
    """A line for each rank: its replica, its device, its part of the model, and how much KV it has.

    `num_blocks` of each replica, by its number.
    """
    lines = []
    for replica, (home, devices, _) in enumerate(deployment.replicas()):
        stage = deployment.stage(home)
        tp, parts = stage.tensor_parallel_size, split_layers(spec, stage)
        for rank, device in enumerate(devices.split(",")):
            layers = parts[rank // tp]
            heads = share_heads(spec.num_heads, spec.num_kv_heads, Rank(rank % tp, tp))
            dtype = dtype_of(spec, deployment.model.dtype, device.partition(":")[0])
            num_tokens = num_blocks.get(replica, 0) * deployment.block_size
            num_bytes = num_tokens * len(layers) * 2 * heads.num_kv * spec.head_dim * DTYPE_BYTES[dtype]
            lines.append(
                f"{home} replica {replica}, rank {rank} on {device}: layers {layers.start}-{layers.stop - 1},"
                f" query heads {heads.queries.start}-{heads.queries.stop - 1},"
                f" {num_bytes / 2**20:,.0f} MiB of KV for {num_tokens:,} tokens"
            )
    return lines
