"""Which sequences run in the next decode iteration of one engine."""

from itertools import islice

from ensemble.errors import InternalError
from ensemble.request import Sequence


class DecodeScheduler:
    """Continuous batching: the batch may change at every iteration. First come, first served."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._sequences: dict[int, Sequence] = {}  # by request_id, in order of joining

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    def add(self, sequence: Sequence) -> None:
        """A sequence whose KV is in the pool joins."""
        if sequence.request_id in self._sequences:
            raise InternalError(f"request {sequence.request_id} already decodes")
        self._sequences[sequence.request_id] = sequence

    def next_batch(self) -> list[Sequence]:
        """The sequences of the next iteration, at most `max_num_seqs`, in order of joining."""
        return list(islice(self._sequences.values(), self.max_num_seqs))

    def remove(self, request_id: int) -> Sequence | None:
        """Takes out a sequence that has finished or was cancelled; None if it is not here."""
        return self._sequences.pop(request_id, None)
