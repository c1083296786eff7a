"""Messages between the scheduler and the instances of the `answer` model, which send what it says."""

from typing import TypeAlias

import msgspec

from ensemble.errors import ErrorCode


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    name: str
    dtype: str  # numpy's; empty: elements are bytes
    shape: list[int]
    data: bytes | list[bytes]


class Send(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A response of a step."""

    step: int
    tensors: list[Tensor]
    final: bool
    handle: str  # to be handed over when it has been sent (handover.py); empty: nobody waits for that


class SendError(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The final response of a step."""

    step: int
    code: ErrorCode
    message: str


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The end of a step without a response. `Ended` answers."""

    step: int


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A step has started, for a client that has cancelled or not."""

    instance: int  # its number: the process id
    step: int  # number, of this instance
    handle: str  # as the request has it: anybody can have made it
    is_cancelled: bool


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    instance: int
    step: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A response could not be sent."""

    handle: str  # of its step


ToAnswer: TypeAlias = Send | SendError | End
FromAnswer: TypeAlias = Started | Ended | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_answer = msgspec.msgpack.Decoder(ToAnswer).decode
decode_from_answer = msgspec.msgpack.Decoder(FromAnswer).decode
