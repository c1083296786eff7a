"""Layouts of the ranks of replicas, by degree."""

from itertools import pairwise

from ensemble.parallel.shares import share_heads
from ensemble.parallel.tensor_parallel import TensorParallel
from ensemble.protocol.replica_replica import PoolLayout

BLOCK_SIZE, HEAD_DIM = 4, 8


def layouts_of(
    num_heads: int,
    num_kv_heads: int,
    tp: int,
    borders: list[int],  # the first layer of each stage of the pipeline, and the number of layers
    num_blocks: int = 8,
) -> list[PoolLayout]:
    """Of every rank, those of a stage of the pipeline in a row."""
    return [
        PoolLayout(
            model="model",
            dtype="float32",
            block_size=BLOCK_SIZE,
            head_dim=HEAD_DIM,
            layers=layers,
            kv_heads=share_heads(num_heads, num_kv_heads, TensorParallel(rank, tp)).kv,
            num_blocks=num_blocks,
        )
        for layers in pairwise(borders)
        for rank in range(tp)
    ]
