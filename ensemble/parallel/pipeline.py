"""The places of a pipeline: each has some of a model's layers, and hands hidden states on to the next.

    tokens --> first place --hidden states--> ... --hidden states--> last place --sampled tokens--> all the others

As in `tensor_parallel`, a place is an object, and gloo or NCCL carries what goes from one to another. A group of NCCL
has one stream, on which its operations follow one another. So neighbours have a group of their own for hidden states:
they wait neither for the tokens of a step before nor for what its place has from the other side.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from ensemble.errors import InternalError

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
        if self.tensor.is_cuda:  # its memory may be another stream's, and is not reused before this one has read it
            self.tensor.record_stream(torch.cuda.current_stream(self.tensor.device))
        return self.tensor


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One place's view. Every place sends and receives for the same steps, counted alike, in the same order."""

    place: int = 0
    size: int = 1
    before: PointToPoint | None = None  # the place before, whose rank is 0, and this one; None: there is none
    after: PointToPoint | None = None  # this place, whose rank is 0, and the next one
    all: PointToPoint | None = None  # the places
    receiving: "torch.cuda.Stream | None" = None  # on which hidden states come, on a GPU

    @property
    def is_first(self) -> bool:
        return self.place == 0

    @property
    def is_last(self) -> bool:
        return self.place == self.size - 1

    def smallest(self, value: int, device_type: str) -> int:
        """Of the places' values; waits for the device."""
        if self.all is None:
            return value
        values, options = torch.tensor([value], device=device_type), dist.AllreduceOptions()
        smallest: Any = dist.ReduceOp.MIN
        options.reduceOp = smallest
        return int(self._in_flight(values, [self.all.allreduce([values], options)]).wait())

    def send_hidden(self, hidden: Tensor, step: int) -> InFlight:
        """[T, hidden_size], to the next place."""
        assert self.after is not None
        return self._in_flight(hidden, [self.after.send([hidden], 1, _tag(step))])

    def receive_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, step: int) -> InFlight:
        """[num_tokens, hidden_size], from the place before, while this one may still be at another step."""
        assert self.before is not None
        stream = self.receiving
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            device = "cpu" if stream is None else stream.device
            hidden = torch.empty(num_tokens, hidden_size, dtype=dtype, device=device)
            return self._in_flight(hidden, [self.before.recv([hidden], 0, _tag(step))])

    def send_tokens(self, sampled: Tensor, step: int) -> InFlight:
        """[S] int64, from the last place to all others."""
        assert self.all is not None
        return self._in_flight(sampled, [self.all.send([sampled], place, _tag(step)) for place in range(self.size - 1)])

    def receive_tokens(self, sampled: Tensor, step: int) -> InFlight:
        """Into `sampled` [S] int64, from the last place."""
        assert self.all is not None
        return self._in_flight(sampled, [self.all.recv([sampled], self.size - 1, _tag(step))])

    def _in_flight(self, tensor: Tensor, works: list[dist.Work]) -> InFlight:
        return InFlight(tensor, works, f"pipeline place {self.place} of {self.size}")


def _tag(step: int) -> int:
    return step % _NUM_STEPS


WHOLE = Pipeline()
