"""A step that has been launched: its tokens, and what goes between the places of a pipeline meanwhile."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensemble.engine.log_probs import StepLogProbs
from ensemble.engine.staging import Staging
from ensemble.parallel.pipeline import InFlight
from ensemble.request import Sequence, TokenLogProbs


class StepHandle:
    """A launched step. Its tokens are on their way to the host: from this device, or from the pipeline's last place."""

    def __init__(
        self,
        sampled: Tensor,  # [S] int64, on the device
        sequences: list[Sequence],  # S of them
        staging: Staging,
        log_probs: StepLogProbs | None = None,
        between_places: "BetweenPlaces | None" = None,
    ) -> None:
        self.sampled = sampled
        self.rows = {sequence.request_id: row for row, sequence in enumerate(sequences)}
        self.is_read = False
        self._log_probs = log_probs
        self._staging = staging  # in use until the step has run
        self._between = between_places or BetweenPlaces()
        self._copied: torch.cuda.Event | None = None
        stream = self._between.token_stream
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            if stream is not None and self._between.coming is not None:
                self._between.coming.wait()
            self._host = staging.to_host(sampled) if sampled.is_cuda else sampled
            if sampled.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()

    @property
    def is_done(self) -> bool:
        """Whether the step has run, at every place. True on a CPU, where waiting alone would tell: gloo does not."""
        return self._copied is None or bool(self._copied.query())

    def token_ids(self) -> list[int]:
        """Waits for the step. One token id for each of `batch.sampled`."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._between.coming is not None:
            with self._between.while_waiting():
                self._between.coming.wait()
        for each in self._between.sent:
            each.wait()
        self.is_read = True
        token_ids: list[int] = self._host.tolist()
        return token_ids[: len(self.rows)]

    def log_probs(self) -> dict[int, TokenLogProbs]:
        """By request_id, for the sequences that ask for them; after `token_ids`."""
        return self._log_probs.read() if self._log_probs is not None else {}


@dataclass(frozen=True, slots=True)
class BetweenPlaces:
    """What goes from one place of a pipeline to another in a step."""

    sent: list[InFlight] = field(default_factory=list)
    coming: InFlight | None = None  # the tokens, where another place samples
    token_stream: "torch.cuda.Stream | None" = None  # on which they come: the next step need not wait for them
    while_waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # the host, for another place
