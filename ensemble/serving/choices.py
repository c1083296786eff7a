"""Several answers to one request: each is a request of its own to the scheduler, and all have one way to the client.

Streamed, the responses of the choices alternate, each with its `sequence_index`. Otherwise they become one response, of
as many elements as there are choices.
"""

import threading
from collections.abc import Callable

import numpy as np

from ensemble.errors import Cancelled, DistServeError
from ensemble.serving.streams import ClientCall, Outputs

# One element, or one row, for each choice.
PER_CHOICE = {
    "text_output",
    "finish_reason",
    "num_output_tokens",
    "vllm_num_output_tokens",
    "output_ids",
    "cum_log_probs",
    "output_log_probs",
    "cumulative_logprob",
    "logprobs",
    "sequence_index",
}


class Choices:
    """The `ClientCall` that the choices share. The first error ends all of them."""

    def __init__(
        self, call: ClientCall, request_ids: list[int], is_streaming: bool, cancel: Callable[[int], None]
    ) -> None:
        self.request_ids = request_ids
        self._call = call
        self._is_streaming = is_streaming
        self._cancel = cancel
        self._lock = threading.Lock()
        self._num_open = len(request_ids)
        self._ended: dict[int, Outputs] = {}  # choice |-> its answer, until all have one
        self._is_closed = False
        self.request_id, self.parameters = call.request_id, call.parameters

    def send(self, outputs: Outputs, final: bool) -> None:
        with self._lock:
            if self._is_closed:
                raise Cancelled("another choice of the request has ended all of them")
            self._num_open -= final
            is_last = self._num_open == 0
            if self._is_streaming:
                self._call.send(outputs, final=is_last)
            else:
                self._ended[int(outputs["sequence_index"][0])] = outputs
                if is_last:
                    self._call.send(merge([self._ended[choice] for choice in sorted(self._ended)]), final=True)
            self._is_closed = is_last

    def send_error(self, error: DistServeError) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._call.send_error(error)
        for request_id in self.request_ids:
            self._cancel(request_id)

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._is_closed and self._call.is_cancelled()


def merge(answers: list[Outputs]) -> Outputs:
    """One response of the choices' own; what there is one of, such as a timeline, is that of the last of them."""
    merged: Outputs = {}
    for name in {name: None for answer in answers for name in answer}:
        arrays = [answer[name] for answer in answers if name in answer]
        if name == "output_log_probs":
            arrays = _padded(arrays)
        merged[name] = np.concatenate(arrays) if name in PER_CHOICE else arrays[-1]
    return merged


def _padded(rows: "list[np.ndarray]") -> "list[np.ndarray]":  # type: ignore[type-arg]
    """[1, length] each, filled by zeros to the longest."""
    longest = max(row.shape[1] for row in rows)
    return [np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in rows]
