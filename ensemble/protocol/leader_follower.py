"""Between the ranks of a replica: the first, which leads, tells the others each step, and what else their pools need.

    leader --Order--> follower          in order, each carried out before the next (copies: started)
    follower --Answer--> leader

A follower has a mirror of each sequence that runs, and samples the same tokens as its leader. So an order of a step
names sequences, and carries what is new of them: who comes for the first time, and blocks.
"""

from typing import Literal, TypeAlias

import msgspec

from ensemble.request import Request, TokenLogProbs


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """One of which the followers know nothing."""

    request: Request
    output_token_ids: list[int]  # so far


class NewBlocks(msgspec.Struct, frozen=True, array_like=True):
    """The block table of a sequence from one of its blocks on."""

    request_id: int
    first: int
    block_ids: list[int]


# ---- orders


class RunStep(_Message, frozen=True, kw_only=True):
    """A step's rows. What it samples is committed when the leader says that it has committed as many steps."""

    prompts: list[tuple[int, int, int]]  # request_id, start, length
    decodes: list[int]  # request ids
    new_sequences: list[NewSequence]
    new_blocks: list[NewBlocks]
    gone: list[int]  # request ids of sequences that run no more
    num_committed: int  # steps before this one whose tokens the leader has read


class CopyBlocks(_Message, frozen=True, kw_only=True):
    """Within the pool: block source_ids[i] |-> block target_ids[i]."""

    source_ids: list[int]
    target_ids: list[int]


class StartSwap(_Message, frozen=True, kw_only=True):
    """Between the device's pool and the host's; answered by Copied."""

    copy_id: int
    request_id: int
    way: Literal["out", "in"]
    source_ids: list[int]
    target_ids: list[int]


class StartPull(_Message, frozen=True, kw_only=True):
    """From the pools of another replica; answered by Copied."""

    copy_id: int
    request_id: int
    address: str  # of the source's first rank
    source_ids: list[int]
    target_ids: list[int]


class AttachReplica(_Message, frozen=True, kw_only=True):
    """Map the pools of a replica; answered by Attached."""

    address: str  # of its first rank


class DetachReplica(_Message, frozen=True, kw_only=True):
    """Close the mappings of its pools: no copy from them is under way."""

    address: str


class GrantLease(_Message, frozen=True, kw_only=True):
    """Readers of that request may read these blocks of the pool."""

    request_id: int
    block_ids: list[int]


class EndLease(_Message, frozen=True, kw_only=True):
    """They may no more: the blocks are for others, from the next order on."""

    request_id: int


class BeginLife(_Message, frozen=True, kw_only=True):
    """The replica begins another life in the same processes; answered by Ready."""

    life: int


Order: TypeAlias = (
    RunStep | CopyBlocks | StartSwap | StartPull | AttachReplica | DetachReplica | GrantLease | EndLease | BeginLife
)


# ---- answers


class Ready(_Message, frozen=True, kw_only=True):
    """The rank is loaded, or has begun the life."""

    rank: int


class Copied(_Message, frozen=True, kw_only=True):
    """A copy has ended."""

    copy_id: int
    seconds: float
    error: str | None = None  # it failed
    is_broken: bool = False  # so would others from there


class Attached(_Message, frozen=True, kw_only=True):
    """The replica's pools are mapped, or cannot be for this reason."""

    address: str
    reason: str | None


class StepLogProbs(_Message, frozen=True, kw_only=True):
    """Of the tokens of a step, by request_id, from a place that samples for its leader; unasked, if any wants them."""

    step: int  # counted from 0
    log_probs: dict[int, TokenLogProbs]


Answer: TypeAlias = Ready | Copied | Attached | StepLogProbs

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def orders_address(group_address: str) -> str:
    """Where the leader is to listen: beside the file at which the ranks meet, or on a free port of the same host."""
    if group_address.startswith("file://"):
        return f"ipc://{group_address.removeprefix('file://')}.orders"
    return f"{group_address.rpartition(':')[0]}:*"
