"""Between the router and the replicas: msgspec structs, msgpack on the wire.

    router --ToStage--> prefill | decode model (items of a channel, unary BLS) --Command, unread--> replica (ZeroMQ)
    replica --Event, unread--> stage --FromStage (items of the channel)--> router

A request's id is that of one attempt at it: an attempt after a lost replica, and every choice of several, has its own.
So nothing that is said of an older attempt can be taken for a newer one. A `life` is a replica from its start, or from
the router's, to its end; what is said to, or by, another life is dropped.

A `KVHandoff` gives its holder the right, and the duty, to end the lease on the source's blocks exactly once:
the router while the sequence waits in the bridge, the reader from `Join` on.
"""

from math import inf
from typing import TypeAlias

import msgspec

from ensemble.request import FinishReason, Request, TokenLogProbs
from ensemble.scheduling.estimator import TimedStep


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class KVHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """A prefilled sequence's KV: in the source's blocks until the reader acknowledges, or the router cancels."""

    request_id: int
    source: str  # address of the source replica's peer socket
    life: int = 0  # of the source
    num_kv_tokens: int
    block_ids: list[int]  # in the source's pool


# ---- commands, to one replica


class PromptChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt is to be computed up to position `end`. Its first chunk carries the request."""

    request_id: int
    end: int
    request: Request | None = None
    stays: bool = False  # it decodes where it was prefilled; else it is handed off


class RunPrompts(_Message, frozen=True, kw_only=True):
    """Chunks to compute, in order, behind those of the batches before; a step takes as many as its budget allows."""

    batch_id: int
    chunks: list[PromptChunk]
    num_behind: float = 0.0  # prompts of the queue, this replica's share
    pace: float = inf  # prompt tokens for each token of the answers, where the rest of the queue waits for their ends


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that is to go on at another replica than the one that has its KV."""

    request: Request
    output_token_ids: list[int]  # so far, those before this attempt included
    handoff: KVHandoff


class Join(_Message, frozen=True, kw_only=True):
    arrivals: list[Arrival]


class HandOff(_Message, frozen=True, kw_only=True):
    """These running sequences go on elsewhere: their KV is leased when their launched steps have run. Answered by
    HandedOff, in one or in parts, for those that have not ended meanwhile."""

    request_ids: list[int]


class LeasePrefix(_Message, frozen=True, kw_only=True):
    """Another replica wants the cached blocks with these hashes, as many of the first as are there: keep them until
    it acknowledges, or the router cancels. Answered by PrefixLeased."""

    lease_id: int  # like a request's, and of no request
    hashes: list[bytes]


class PullPrefix(_Message, frozen=True, kw_only=True):
    """Blocks that another replica has cached and leased: fetch and cache those that are not here. Answered by
    PrefixPulled."""

    handoff: KVHandoff
    hashes: list[bytes]


class CancelRequests(_Message, frozen=True, kw_only=True):
    """Ends requests at this replica in whatever state they are; confirmed by Released."""

    request_ids: list[int]


class AttachPeer(_Message, frozen=True, kw_only=True):
    """Map that replica's pool now, so that the first hand-off need not wait for it."""

    address: str  # of its peer socket


class DetachPeer(_Message, frozen=True, kw_only=True):
    """That life of a replica has ended: close the mapping of its pool, and say so by Detached."""

    address: str  # of its peer socket


Command: TypeAlias = RunPrompts | Join | HandOff | LeasePrefix | PullPrefix | CancelRequests | AttachPeer | DetachPeer


# ---- events, of one replica


class StepDone(_Message, frozen=True, kw_only=True):
    """One step's tokens, as columns, and the prompts that it has finished."""

    request_ids: list[int]
    positions: list[int]  # of the tokens among their outputs, from 0
    token_ids: list[int]
    finished: dict[int, FinishReason]
    log_probs: dict[int, TokenLogProbs]  # of the tokens of those that ask for them
    handoffs: list[KVHandoff]  # of finished prompts that go on elsewhere
    batch_ids: list[int]  # of RunPrompts that have run to their ends
    num_free_blocks: int  # by the replica's own count
    timed: TimedStep | None = None  # None: there was no step


class Joined(_Message, frozen=True, kw_only=True):
    """Sequences whose KV has arrived and that take part from the next step on."""

    request_ids: list[int]
    transfer_s: list[float]  # of the copies themselves
    transfer_bytes: list[int]
    waited_s: list[float] = []  # from the arrival to its last byte, less transfer_s
    transports: list[str] = []  # by which its KV came; empty: it was here


class Released(_Message, frozen=True, kw_only=True):
    """Requests whose blocks at this replica are free again."""

    request_ids: list[int]
    num_free_blocks: int  # by the replica's own count


class Preempted(_Message, frozen=True, kw_only=True):
    """Sequences given up for others, all their tokens told; their blocks are free. They have to be computed again."""

    request_ids: list[int]
    num_free_blocks: int  # by the replica's own count


class SwapReport(_Message, frozen=True, kw_only=True):
    """What a replica has swapped since its last report."""

    num_swapped_seqs: int  # now in the host pool, or on the way
    num_free_host_blocks: int  # now
    num_preemptions: int  # sequences swapped out
    bytes_out: int  # of completed copies
    bytes_in: int
    out_s: list[float]  # of each
    in_s: list[float]


class PrefixReport(_Message, frozen=True, kw_only=True):
    """What has changed in a replica's prefix cache since its last report."""

    stored: list[bytes]  # hashes of blocks, see cache/prefix_cache.py
    evicted: list[bytes]  # to be applied first
    num_queried_tokens: int  # prompt tokens asked for
    num_hit_tokens: int  # of them found


class HandedOff(_Message, frozen=True, kw_only=True):
    """Running sequences that decode here no more, all their tokens told."""

    handoffs: list[KVHandoff]
    stay: list[int] = []  # request ids of those that cannot go: their KV is not all on the device


class PrefixLeased(_Message, frozen=True, kw_only=True):
    """What is kept of a prefix; without blocks nothing is, and no lease is there."""

    handoff: KVHandoff  # its request_id is the lease's


class PrefixPulled(_Message, frozen=True, kw_only=True):
    """So many tokens of a prefix are cached here now, by a copy or before; nothing is read at its source any more."""

    lease_id: int
    num_tokens: int
    seconds: float = 0.0  # of the copy
    num_bytes: int = 0
    transport: str = ""  # by which it came; empty: nothing did
    reason: str | None = None  # why it did not come


class AttachFailed(_Message, frozen=True, kw_only=True):
    """The pool of the replica at this address cannot be read here, and why. What was to come from it is given up."""

    address: str
    reason: str
    request_ids: list[int]


class PullsFailed(_Message, frozen=True, kw_only=True):
    """Sequences whose KV could not be had, and why: request_id |-> reason. Their blocks here are free."""

    reasons: dict[int, str]


class Detached(_Message, frozen=True, kw_only=True):
    """The pool of the replica at this address is mapped here no more."""

    address: str


Event: TypeAlias = (
    StepDone
    | Joined
    | Released
    | Preempted
    | SwapReport
    | PrefixReport
    | HandedOff
    | PrefixLeased
    | PrefixPulled
    | AttachFailed
    | PullsFailed
    | Detached
)


# ---- items of the channel: commands and events with their replica, and what concerns the stage itself


class ToReplica(_Message, frozen=True, kw_only=True):
    """Passed on if that is the replica's present life."""

    replica: int
    life: int
    command: msgspec.Raw


class StartReplica(_Message, frozen=True, kw_only=True):
    """A dead replica's pool is mapped by nobody any more: its next life may start."""

    replica: int


class AddReplica(_Message, frozen=True, kw_only=True):
    """Starts a replica that the stage has not had."""

    replica: int
    device: str


class RemoveReplica(_Message, frozen=True, kw_only=True):
    """Ends a replica for good, whatever it does."""

    replica: int


ToStage: TypeAlias = ToReplica | StartReplica | AddReplica | RemoveReplica


class ReplicaWaits(_Message, frozen=True, kw_only=True):
    """A replica that is to start cannot yet."""

    replica: int
    waits_for: str


class ReplicaUp(_Message, frozen=True, kw_only=True):
    """The first that is said of a life; said again to a router that is new, of a new life in the same process."""

    replica: int
    life: int
    device: str
    node: str = ""  # of several machines; empty: its stage's own
    num_blocks: int
    num_host_blocks: int  # 0: it does not swap
    num_places: int  # sequences that it takes to decode: running, waiting and swapped
    pid: int
    peer_address: str  # where others attach its pool
    timed: list[TimedStep] = []  # steps that it ran before it was up


class ReplicaDown(_Message, frozen=True, kw_only=True):
    """The last that is said of a life. The process has exited, unless the life never came up."""

    replica: int
    life: int
    reason: str
    is_final: bool = False  # it was removed, or could not be started: there is no next life


class FromReplica(_Message, frozen=True, kw_only=True):
    replica: int
    life: int
    event: msgspec.Raw


FromStage: TypeAlias = ReplicaWaits | ReplicaUp | ReplicaDown | FromReplica

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_to_stage = msgspec.msgpack.Decoder(ToStage).decode
decode_from_stage = msgspec.msgpack.Decoder(FromStage).decode
