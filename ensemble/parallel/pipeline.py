"""The places of a pipeline: each has some of a model's layers, and hands hidden states on to the next.

    tokens --> first place --hidden states--> ... --hidden states--> last place --sampled tokens--> all the others

As in `tensor_parallel`, a place is an object, and gloo or NCCL carries what goes from one to another.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from ensemble.errors import InternalError

_HIDDEN, _TOKENS = 0, 1
_NUM_STEPS = 1 << 20  # whose tags differ: gloo does not keep the order of what has the same tag


class PointToPoint(Protocol):
    """What is used of torch's gloo and NCCL."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work: ...

    def send(self, tensors: list[Tensor], to: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], from_: int, tag: int) -> dist.Work: ...


@dataclass(slots=True, eq=False)
class InFlight:
    """A tensor on its way. It is not to be changed before `wait` has returned."""

    tensor: Tensor
    works: list[dist.Work]  # each is waited for once: gloo would wait for another message
    where: str

    def wait(self) -> Tensor:
        """On a GPU the current stream waits, not the host. Raises InternalError where the other place is gone."""
        try:
            while self.works:
                self.works.pop().wait()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InternalError(f"{self.where}: another place is gone: {reason}") from None
        return self.tensor


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One place's view. Every place sends and receives for the same steps, counted alike, in the same order."""

    place: int = 0
    size: int = 1
    channel: PointToPoint | None = None  # None: there are no other places

    @property
    def is_first(self) -> bool:
        return self.place == 0

    @property
    def is_last(self) -> bool:
        return self.place == self.size - 1

    def smallest(self, value: int, device_type: str) -> int:
        """Of the places' values; waits for the device."""
        if self.channel is None:
            return value
        values, options = torch.tensor([value], device=device_type), dist.AllreduceOptions()
        smallest: Any = dist.ReduceOp.MIN
        options.reduceOp = smallest
        return int(self._in_flight(values, [self.channel.allreduce([values], options)]).wait())

    def send_hidden(self, hidden: Tensor, step: int) -> InFlight:
        """[T, hidden_size], to the next place."""
        return self._send(hidden, [self.place + 1], _tag(_HIDDEN, step))

    def receive_hidden(self, hidden: Tensor, step: int) -> InFlight:
        """Into `hidden` [T, hidden_size], from the place before."""
        return self._receive(hidden, self.place - 1, _tag(_HIDDEN, step))

    def send_tokens(self, sampled: Tensor, step: int) -> InFlight:
        """[S] int64, from the last place to all others."""
        return self._send(sampled, list(range(self.size - 1)), _tag(_TOKENS, step))

    def receive_tokens(self, sampled: Tensor, step: int) -> InFlight:
        """Into `sampled` [S] int64, from the last place."""
        return self._receive(sampled, self.size - 1, _tag(_TOKENS, step))

    def _send(self, tensor: Tensor, places: list[int], tag: int) -> InFlight:
        assert self.channel is not None
        return self._in_flight(tensor, [self.channel.send([tensor], place, tag) for place in places])

    def _receive(self, tensor: Tensor, place: int, tag: int) -> InFlight:
        assert self.channel is not None
        return self._in_flight(tensor, [self.channel.recv([tensor], place, tag)])

    def _in_flight(self, tensor: Tensor, works: list[dist.Work]) -> InFlight:
        return InFlight(tensor, works, f"pipeline place {self.place} of {self.size}")


def _tag(kind: int, step: int) -> int:
    return 2 * (step % _NUM_STEPS) + kind


WHOLE = Pipeline()
