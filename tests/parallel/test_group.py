"""How the ranks of a replica meet, and how a pipeline's places divide the layers."""

import socket
import threading
from datetime import timedelta
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from ensemble.errors import ConfigError
from ensemble.parallel.group import ALONE, Group, make_store, meet
from ensemble.parallel.shares import share_layers
from ensemble.parallel.tensor_parallel import connect

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_ranks_meet_and_know_each_other_s_places(scheme: str, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/group" if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"
    groups: dict[int, Group] = {}
    said: dict[int, tuple[str, int]] = {}

    def run(rank: int) -> None:
        groups[rank] = group = meet(address, rank, 2, 2, CPU, timeout_s=20)
        if rank == 3:
            group.publish("who", "the last one")
        said[rank] = group.look_up("who"), group.smallest(10 - rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == dict.fromkeys(range(4), ("the last one", 7))
    assert [(groups[rank].pipeline.place, groups[rank].tensor.rank) for rank in range(4)] == [
        *((0, 0), (0, 1)),
        *((1, 0), (1, 1)),
    ]
    assert [groups[rank].rank for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_a_store_waits_as_long_as_it_is_asked_to(scheme: str, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/group" if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"
    assert make_store(address, 0, 2, 777.0).timeout == timedelta(seconds=777)


def test_one_rank_meets_nobody_and_other_addresses_are_refused() -> None:
    assert meet("nowhere", 0, 1, 1, CPU) is ALONE
    with pytest.raises(ConfigError, match="group address = ipc://x: file:///PATH or tcp://HOST:PORT"):
        meet("ipc://x", 0, 2, 1, CPU)


def test_a_rank_alone_in_its_place_knows_on_which_kind_of_device_its_pipeline_agrees() -> None:
    gpu = torch.device("cuda", 1)
    assert Group(connect(HashStore(), 0, 1, gpu)).tensor.device_type == "cuda"


@pytest.mark.parametrize("head_cost", [0.0, 0.4, 1.7, 5.0])
@pytest.mark.parametrize("num_places", [1, 2, 3, 4])
@pytest.mark.parametrize("num_layers", [4, 7, 12])
def test_the_slowest_place_is_as_fast_as_can_be(num_layers: int, num_places: int, head_cost: float) -> None:
    def slowest(counts: list[int]) -> float:
        return max([*counts[:-1], counts[-1] + head_cost])

    parts = share_layers(num_layers, num_places, head_cost)
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert all(len(part) for part in parts)
    splits = [[0, *cut, num_layers] for cut in combinations(range(1, num_layers), num_places - 1)]
    best = min(slowest([end - start for start, end in pairwise(borders)]) for borders in splits)
    assert slowest([len(part) for part in parts]) == best


def test_a_split_that_is_asked_for_and_ones_that_cannot_be() -> None:
    assert share_layers(5, 2, 0.0, [1, 4]) == [range(1), range(1, 5)]
    with pytest.raises(ConfigError, match=r"pipeline_layers = \[2, 4\]: the model's 5 layers are needed in all"):
        share_layers(5, 2, 0.0, [2, 4])
    with pytest.raises(ConfigError, match="pipeline_parallel_size = 6: the model has 5 layers"):
        share_layers(5, 6, 0.0)
