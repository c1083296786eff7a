"""Between replicas: the source of KV offers its pool and hears when its blocks are read no more."""

from typing import Any, Literal, TypeAlias

import msgspec


class AttachPool(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for the handle of the replica's KV pool; answered by PoolHandle."""


class PoolHandle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How another process maps the pool: a path to the exporter's memfd, or torch's CUDA IPC tuple."""

    kind: Literal["memfd", "cuda_ipc"]
    handle: bytes
    shape: list[int]  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    dtype: str


class TransferDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ends leases: the copies have completed, or were given up before they began."""

    request_ids: list[int]


PeerCall: TypeAlias = AttachPool | TransferDone

encode = msgspec.msgpack.Encoder().encode
decode_peer_call = msgspec.msgpack.Decoder(PeerCall).decode
decode_pool_handle = msgspec.msgpack.Decoder(PoolHandle).decode
decode_cuda_ipc = msgspec.msgpack.Decoder(tuple[Any, ...]).decode
