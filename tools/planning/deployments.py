"""Deployments of a plan: as they are written to files, and as the router sees them in virtual time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.planning.search import Cluster, Placement


@dataclass(frozen=True, slots=True)
class Deployments:
    """Of one model on one cluster; what they have in common."""

    model: Path
    cluster: Cluster
    budget: int  # prompt tokens of a batch
    has_shared_prefixes: bool
    swap_bytes: int  # of host memory of each decode replica

    def disaggregated(self, placement: Placement) -> dict[str, Any]:
        """A degree of 1 is left out."""
        devices = layout(placement, self.cluster)
        raw = self._raw("disaggregated", *devices, {})
        raw["scheduler"] = {"roles": "fixed"}  # else `make serve` would take auto
        for stage, phase in (("prefill", placement.prefill), ("decode", placement.decode)):
            raw[stage] |= {"tensor_parallel_size": phase.tp} if phase.tp > 1 else {}
            raw[stage] |= {"pipeline_parallel_size": phase.pp} if phase.pp > 1 else {}
        return raw | self._launcher

    def colocated(self, number: int, tp: int, chunk: int) -> dict[str, Any]:
        raw = self._raw("colocated", [], list(range(number * tp)), {"local_prefill_tokens": chunk})
        raw["decode"] |= {"tensor_parallel_size": tp} if tp > 1 else {}
        return raw | self._launcher

    def virtual(
        self, num_prefill: int, num_decode: int, fields: dict[str, Any], prefill_pp: int = 1, decode_pp: int = 1
    ) -> dict[str, Any]:
        """As the router sees it: a device for each place of a replica. `fields`: of decode."""
        first = num_prefill * prefill_pp
        decode_devices = list(range(first, first + num_decode * decode_pp))
        raw = self._raw("disaggregated" if num_prefill else "colocated", list(range(first)), decode_devices, fields)
        raw["prefill"] |= {"pipeline_parallel_size": prefill_pp} if prefill_pp > 1 else {}
        raw["decode"] |= {"pipeline_parallel_size": decode_pp} if decode_pp > 1 else {}
        return raw

    @property
    def _launcher(self) -> dict[str, Any]:
        return {"launcher": "ray"} if self.cluster.num_nodes > 1 else {}

    def _raw(
        self, mode: str, prefill_devices: list[int], decode_devices: list[int], decode: dict[str, Any]
    ) -> dict[str, Any]:
        swapping = {"policy": "sj-mlfq", "host_kv_bytes": self.swap_bytes} if self.swap_bytes else {}
        caching = {"prefix_cache": True} if self.has_shared_prefixes else {}
        return {
            "mode": mode,
            "model": {"path": str(self.model)},
            "prefill": {"max_num_batched_tokens": self.budget, **caching, "devices": _cuda(prefill_devices)},
            "decode": {**decode, **swapping, "devices": _cuda(decode_devices)},
            "block_size": 64,
        }


def _cuda(devices: list[int]) -> list[str]:
    return [f"cuda:{index}" for index in devices]


def layout(placement: Placement, cluster: Cluster) -> tuple[list[int], list[int]]:
    """GPUs of prefill and of decode, replica by replica, each in the order of its places: numbered over all nodes.

    Low affinity: a group of `places` nodes has the same replicas as any other, of which place i lies on its node i.
    """
    prefill, decode = placement.prefill, placement.decode
    if placement.affinity == "high" or cluster.num_nodes == 1:
        num_prefill = placement.num_prefill * prefill.num_gpus
        return list(range(num_prefill)), list(range(num_prefill, placement.num_gpus))
    per_node, places = cluster.gpus_per_node, placement.places
    group = per_node * places
    share = placement.num_prefill * prefill.num_gpus + placement.num_decode * decode.num_gpus
    num_groups = next(
        number
        for number in range(1, cluster.num_nodes // places + 1)
        if share // number <= group and not placement.num_prefill % number and not placement.num_decode % number
    )
    devices: tuple[list[int], list[int]] = [], []
    for number in range(num_groups):
        taken = [0] * places  # GPUs of each node of the group
        for kind, (phase, count) in enumerate(((prefill, placement.num_prefill), (decode, placement.num_decode))):
            for _ in range(count // num_groups):
                for place in range(phase.pp):
                    node = place * places // phase.pp
                    first = number * group + node * per_node + taken[node]
                    devices[kind].extend(range(first, first + phase.tp))
                    taken[node] += phase.tp
    return devices
