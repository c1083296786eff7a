"""Bytes in equal bytes out between replicas of any degrees, with their handshake."""

import pytest
import torch

from tests.transfer.fleet import NUM_LAYERS, Reader, SourceRanks
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
SOURCE_IDS, TARGET_IDS = [6, 1, 2, 3], [0, 4, 5, 7]


@pytest.mark.parametrize("num_kv_heads", [12, 4, 1])
@pytest.mark.parametrize("source_split", SPLITS)
def test_every_layout_reads_from_every_other(source_split, num_kv_heads, tmp_path):
    sources = SourceRanks(layouts_of(12, num_kv_heads, *SPLITS[source_split]), tmp_path)
    for split in SPLITS.values():
        for rank, layout in enumerate(layouts_of(12, num_kv_heads, *split)):
            reader = Reader(layout, rank)
            assert reader.attach(sources.address) == [(sources.address, None)]
            pull = reader.pull(sources.address, SOURCE_IDS, TARGET_IDS)
            assert torch.equal(reader.pool.tensor, reader.expected(num_kv_heads, SOURCE_IDS, TARGET_IDS))
            assert pull.num_bytes == len(TARGET_IDS) * reader.pool.layout.block_bytes
            reader.close()
    sources.close()
