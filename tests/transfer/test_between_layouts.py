"""Bytes in equal bytes out between replicas of any degrees, with their handshake."""

import pytest
import torch

from ensemble.transfer import link
from tests.transfer.fleet import CPU, NUM_LAYERS, Reader, SourceRanks
from tests.transfer.layouts import layouts_of

SPLITS = {  # tp, borders of the pipeline's stages
    "1x1": (1, [0, NUM_LAYERS]),
    "2x1": (2, [0, NUM_LAYERS]),
    "3x1": (3, [0, NUM_LAYERS]),
    "4x1": (4, [0, NUM_LAYERS]),
    "1x2": (1, [0, 3, NUM_LAYERS]),
    "3x2": (3, [0, 4, NUM_LAYERS]),
    "2x3": (2, [0, 1, 5, NUM_LAYERS]),
}
SOURCE_IDS, TARGET_IDS, REQUEST_ID = [6, 1, 2, 3], [0, 4, 5, 7], 5


NUM_KV_HEADS = 4


def pull_into_each(sources, split, transport, device=CPU):
    for rank, layout in enumerate(layouts_of(12, NUM_KV_HEADS, *SPLITS[split])):
        reader = Reader(layout, rank, transport, device=device)
        assert reader.attach(sources.address) == [(sources.address, None)]
        pull = reader.pull(sources.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
        assert pull.error is None and pull.source.transport == transport
        assert torch.equal(reader.pool.tensor, reader.expected(NUM_KV_HEADS, SOURCE_IDS, TARGET_IDS))
        assert pull.num_bytes == len(TARGET_IDS) * reader.pool.layout.block_bytes
        reader.close()


def make_sources(split, tmp_path, device=CPU):
    sources = SourceRanks(layouts_of(12, NUM_KV_HEADS, *SPLITS[split]), tmp_path, device=device)
    sources.leases.grant(REQUEST_ID, SOURCE_IDS)
    return sources


@pytest.mark.parametrize("source_split", SPLITS)
def test_every_layout_reads_from_every_other(source_split, tmp_path):
    sources = make_sources(source_split, tmp_path)
    for split in SPLITS:
        pull_into_each(sources, split, "cuda_ipc")
    sources.close()


@pytest.fixture
def small_slots(monkeypatch):
    """More chunks than are under way at a time."""
    monkeypatch.setattr(link, "SLOT_BYTES", dict.fromkeys(link.SLOT_BYTES, 1))


@pytest.mark.parametrize("transport", ["host", "nccl"])
@pytest.mark.parametrize(
    ("source_split", "split"), [("1x1", "1x1"), ("2x1", "1x2"), ("1x2", "3x1"), ("4x1", "2x1"), ("3x2", "2x3")]
)
def test_by_links(source_split, split, transport, tmp_path, small_slots):
    sources = make_sources(source_split, tmp_path)
    pull_into_each(sources, split, transport)
    sources.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("source_split", "split"), [("1x1", "1x1"), ("2x1", "1x2"), ("3x2", "2x3")])
def test_through_host_memory_between_pools_of_a_gpu(source_split, split, tmp_path):
    device = torch.device("cuda", 0)
    sources = make_sources(source_split, tmp_path, device)
    pull_into_each(sources, split, "host", device)
    sources.close()


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["host", "nccl"])
@pytest.mark.parametrize(("source_split", "split"), [("1x1", "1x1"), ("2x1", "1x2"), ("3x2", "2x3")])
def test_between_two_gpus(source_split, split, transport, tmp_path):
    sources = make_sources(source_split, tmp_path, torch.device("cuda", 0))
    pull_into_each(sources, split, transport, torch.device("cuda", 1))
    sources.close()


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["host", "nccl"])
@pytest.mark.parametrize(("source_split", "split"), [("1x1", "1x1"), ("2x1", "1x2"), ("1x1", "2x1"), ("3x2", "2x3")])
def test_many_chunks_between_two_gpus(source_split, split, transport, tmp_path, small_slots):
    sources = make_sources(source_split, tmp_path, torch.device("cuda", 0))
    for _ in range(3):
        pull_into_each(sources, split, transport, torch.device("cuda", 1))
    sources.close()
