"""Between replicas, rank to rank: the source of KV offers its pool and hears when its blocks are read no more.

A call that cannot be read is answered by Refused, and harms nobody.
"""

from typing import Any, Literal, TypeAlias

import msgspec


class PoolLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of which model's KV a pool holds, and in what shape.

    A block is [layers, 2, kv_heads, block_size, head_dim].
    """

    model: str  # fingerprint
    dtype: str
    block_size: int  # tokens
    head_dim: int
    layers: tuple[int, int]  # the first, and the one after the last
    kv_heads: tuple[int, ...]  # the model's KV head behind each of the pool's; one may be there more than once
    num_blocks: int

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]


class AttachPool(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for the rank's offer; answered by PoolOffer."""


class PoolHandle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How another process maps the pool: a path to the exporter's memfd, or torch's CUDA IPC tuple."""

    kind: Literal["memfd", "cuda_ipc"]
    handle: bytes
    shape: list[int]  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    dtype: str
    host: str = ""  # cuda_ipc: which the exporter is on; what its bytes mean on another is chance


class PoolOffer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a rank has for those that read its pool."""

    life: int  # of the replica: what is said of another is not of this pool's blocks
    rank_addresses: list[str]  # of all ranks of the replica, the leader's first
    layout: PoolLayout
    handle: PoolHandle


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The call was not obeyed, and why."""

    reason: str


class TransferDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ends leases: the copies have completed, or were given up before they began."""

    request_ids: list[int]


# ---- links: KV as packed chunks through a few slots, for pools that are not mapped. A call's answers are to the socket
# that it came from, which is one link's alone.

Carrier: TypeAlias = Literal["shared", "frames", "pair"]


class OpenLink(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for a link; answered by LinkOpened, when the source has slots for it, or by Refused.

    A chunk's bytes come in memory that both map (`shared`), in a frame behind ChunksReady (`frames`), or by a send to
    the reader's receive (`pair`: NCCL's, or gloo's between CPUs).
    """

    carrier: Carrier
    num_slots: int
    slot_bytes: int
    memory: str = ""  # shared: path and name of the reader's memory file


class LinkOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    rendezvous: bytes = b""  # pair: where the two meet


class ReadProbe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for the beginning of a slot full of a byte, which comes as a chunk does."""

    chunk: int
    slot: int
    byte: int


class ReadChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Some layers and heads of blocks."""

    chunk: int  # number, of one link
    slot: int
    life: int  # of the replica that is asked
    request_id: int  # whose lease the blocks are in
    first_layer: int  # of the pool's
    num_layers: int
    first_head: int
    num_heads: int
    block_ids: list[int]


class ReadChunks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for chunks, packed; each is answered by ChunksReady or ChunkRefused. By a pair the reader receives them when
    it hears ChunksCome, which is before that.
    """

    chunks: list[ReadChunk]


class ChunksCome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Pair only: the source sends these now, in this order, after those of which it has said so before."""

    chunks: list[int]


class ChunksReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The source has read the blocks, and the lease still kept them: slots have the bytes, or they have been sent.

    By `frames` it is one chunk, with a frame behind this.
    """

    chunks: list[int]


class ChunkRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    chunk: int
    reason: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the source to a link's reader, who passes it over: that it can be sent tells that the reader is there."""


class CloseLink(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Not answered."""


LinkCall: TypeAlias = OpenLink | ReadProbe | ReadChunks | CloseLink
LinkAnswer: TypeAlias = LinkOpened | ChunksCome | ChunksReady | ChunkRefused | Refused | Beat
PeerCall: TypeAlias = AttachPool | TransferDone | LinkCall
PeerAnswer: TypeAlias = PoolOffer | LinkAnswer

encode = msgspec.msgpack.Encoder().encode
decode_peer_call = msgspec.msgpack.Decoder(PeerCall).decode
decode_peer_answer = msgspec.msgpack.Decoder(PeerAnswer).decode
decode_pool_handle = msgspec.msgpack.Decoder(PoolHandle).decode
decode_cuda_ipc = msgspec.msgpack.Decoder(tuple[Any, ...]).decode
