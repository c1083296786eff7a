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
    request_id: int  # whose stream waits until it has been sent (handover.py)
    number: int  # of the response there; 0: nobody waits


class SendError(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The final response of a step."""

    step: int
    code: ErrorCode
    message: str


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The end of a step without a response. `StepEnded` answers."""

    step: int


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A step has started, for a client that has cancelled or not."""

    instance: int  # its number: the process id
    step: int  # number, of this instance
    request_id: int  # of the ensemble's request, or its first
    is_cancelled: bool


class StepEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    instance: int
    step: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A response could not be sent."""

    request_id: int  # as its step had it


ToAnswer: TypeAlias = Send | SendError | End
FromAnswer: TypeAlias = Started | StepEnded | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_answer = msgspec.msgpack.Decoder(ToAnswer).decode
decode_from_answer = msgspec.msgpack.Decoder(FromAnswer).decode
