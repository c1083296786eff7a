"""The messages between the scheduler, the stages and their workers: msgspec structs, msgpack on the wire.

    scheduler --StageCall--> prefill | decode model (unary BLS)  --forwarded unread--> worker (ZeroMQ)
    worker --WorkerEvent--> stage --Events (answer of a parked Poll), PrefillAnswer--> scheduler
    decode worker --PeerCall--> prefill worker   (attach the pool, acknowledge transfers)

A `KVHandoff` gives its holder the right, and the duty, to end the lease on the source's blocks exactly once:
the scheduler while the sequence waits in the bridge, the decode worker from `SubmitDecode` on.
"""

from typing import Any, Literal, TypeAlias

import msgspec

from ensemble.request import FinishReason, Request, TokenLogProbs


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# ---- hand-off


class KVHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """A prefilled sequence on its way to decode. Its KV stays in the source's blocks until acknowledged."""

    transfer_id: int  # unique in the life of the source worker
    source: str  # address of the source worker's peer socket
    request: Request
    output_token_ids: list[int]
    num_kv_tokens: int
    block_ids: list[int]  # in the source's pool


# ---- scheduler to stage
#
# Commands to one replica are numbered from 0 in each epoch of its worker. BLS calls from several threads may overtake
# each other; the stage forwards them in order, so that a cancel never precedes what it cancels.


class _Command(_Message, frozen=True, kw_only=True):
    replica: int
    epoch: int = 0
    number: int = 0  # set by the sender


class PrefillChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Positions [start, start + length) of a prompt. The first chunk carries the request and reserves all blocks."""

    request_id: int
    start: int
    length: int
    request: Request | None = None


class PrefillBatch(_Command, frozen=True, kw_only=True):
    """A prefill replica answers it by PrefillAnswer when the batch has run.

    A decode replica that computes prompts too answers it at once, and tells what becomes of it by LocalPrefilled
    events: so first tokens come before the next ones.
    """

    batch_id: int
    chunks: list[PrefillChunk]


class SubmitDecode(_Command, frozen=True, kw_only=True):
    """Answered at once; what becomes of the sequences comes as events."""

    handoffs: list[KVHandoff]


class CancelRequests(_Command, frozen=True, kw_only=True):
    """Ends requests at this replica in whatever state they are; answered at once, confirmed by Released events."""

    request_ids: list[int]


class AttachPeer(_Command, frozen=True, kw_only=True):
    """A prefill worker serves: its readers map its pool now, so that the first hand-off need not wait for it."""

    address: str  # of its peer socket


class DetachPeer(_Command, frozen=True, kw_only=True):
    """A prefill worker has died: its readers close their mapping of its pool and say so by Detached."""

    address: str  # of its peer socket


class StartWorker(_Message, frozen=True, kw_only=True):
    """A dead worker's pool is mapped by nobody any more: the next life of its replica may start. Answered at once."""

    replica: int


class EndWorker(_Message, frozen=True, kw_only=True):
    """A command to this life of the worker was lost: it is killed, and started again. Answered at once."""

    replica: int
    epoch: int


class Poll(_Message, frozen=True, kw_only=True):
    """Parked until the replica has events, at most `max_wait_s`. One at a time: it ends one that is still parked."""

    replica: int
    last_number: int = 0  # of the last answer that has arrived
    max_wait_s: float = 1.0


Command: TypeAlias = PrefillBatch | SubmitDecode | CancelRequests | AttachPeer | DetachPeer
StageCall: TypeAlias = Command | StartWorker | EndWorker | Poll


# ---- worker events


class PrefillResult(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that is finished: its first token, and how it goes on (None when it ended there)."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    handoff: KVHandoff | None
    log_probs: TokenLogProbs | None = None  # if the request asks for them


class PrefillAnswer(_Message, frozen=True, kw_only=True):
    batch_id: int
    results: list[PrefillResult]
    compute_s: float  # time the batch took in the worker


class LocalPrefilled(_Message, frozen=True, kw_only=True):
    """The prompts' part of a decode replica's step. What is not finished with its first token decodes there."""

    batch_ids: list[int]  # that have run to their ends
    results: list[PrefillResult]
    num_free_blocks: int  # by the worker's own count


class StepTokens(_Message, frozen=True, kw_only=True):
    """The tokens of one decode iteration, columns in batch order."""

    request_ids: list[int]
    token_ids: list[int]
    finished: dict[int, FinishReason]
    log_probs: dict[int, TokenLogProbs] = {}  # of those that ask for them
    num_free_blocks: int  # by the worker's own count


class PrefixReport(_Message, frozen=True, kw_only=True):
    """What has changed in a prefill worker's prefix cache since its last report."""

    stored: list[bytes]  # hashes of blocks, see cache/prefix_cache.py
    evicted: list[bytes]  # to be applied first
    num_queried_tokens: int  # prompt tokens asked for
    num_hit_tokens: int  # of them found


class Joined(_Message, frozen=True, kw_only=True):
    """Sequences whose KV has arrived and that take part from the next iteration on."""

    request_ids: list[int]
    transfer_s: list[float]
    transfer_bytes: list[int]


class Reserved(_Message, frozen=True, kw_only=True):
    """A prefill batch has its blocks."""

    num_free_blocks: int  # by the worker's own count


class Released(_Message, frozen=True, kw_only=True):
    """Requests whose blocks at this replica are free again."""

    request_ids: list[int]
    num_free_blocks: int  # by the worker's own count


class SwapReport(_Message, frozen=True, kw_only=True):
    """What a decode worker has swapped since its last report."""

    num_swapped_seqs: int  # now in the host pool, or on the way
    num_preemptions: int  # sequences swapped out
    bytes_out: int  # of completed copies
    bytes_in: int


class ReplicaUp(_Message, frozen=True, kw_only=True):
    """First message of a worker that has loaded its model; repeated to a scheduler that polls for the first time."""

    replica: int
    epoch: int
    num_blocks: int
    num_host_blocks: int  # of a decode replica's host pool; 0: it does not swap
    max_num_seqs: int  # of a decode replica: running, waiting and swapped
    pid: int
    peer_address: str  # where others attach its pool; only a prefill worker's is in use


class ReplicaDown(_Message, frozen=True, kw_only=True):
    replica: int
    epoch: int
    reason: str


class Detached(_Message, frozen=True, kw_only=True):
    """The pool of the peer at this address is mapped here no more."""

    address: str


class LoadFailed(_Message, frozen=True, kw_only=True):
    """The worker cannot start; the reason is the operator's one line."""

    reason: str


WorkerEvent: TypeAlias = (
    PrefillAnswer
    | LocalPrefilled
    | StepTokens
    | Joined
    | Reserved
    | Released
    | SwapReport
    | PrefixReport
    | Detached
    | ReplicaUp
    | ReplicaDown
    | LoadFailed
)


class Events(_Message, frozen=True, kw_only=True):
    """Answer to a Poll: what happened at the replica since the last one that arrived, in order."""

    replica: int
    number: int
    events: list[WorkerEvent]


class Accepted(_Message, frozen=True, kw_only=True):
    """Answer to a call whose effects come as events."""


StageAnswer: TypeAlias = Events | PrefillAnswer | Accepted


# ---- worker to worker


class AttachPool(_Message, frozen=True, kw_only=True):
    """Asks for the handle of the worker's KV pool; answered by PoolHandle."""


class PoolHandle(_Message, frozen=True, kw_only=True):
    """How another process maps the pool: a path to the exporter's memfd, or torch's CUDA IPC tuple."""

    kind: Literal["memfd", "cuda_ipc"]
    handle: bytes
    shape: list[int]  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    dtype: str


class TransferDone(_Message, frozen=True, kw_only=True):
    """Ends the leases: the copies have completed, or were given up before they began."""

    transfer_ids: list[int]


PeerCall: TypeAlias = AttachPool | TransferDone

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_stage_call = msgspec.msgpack.Decoder(StageCall).decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_stage_answer = msgspec.msgpack.Decoder(StageAnswer).decode
decode_worker_event = msgspec.msgpack.Decoder(WorkerEvent).decode
decode_peer_call = msgspec.msgpack.Decoder(PeerCall).decode
decode_pool_handle = msgspec.msgpack.Decoder(PoolHandle).decode
decode_cuda_ipc = msgspec.msgpack.Decoder(tuple[Any, ...]).decode
