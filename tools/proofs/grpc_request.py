"""One request on a gRPC stream of its own: what tools that put a server under load send."""

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

Inputs = dict[str, np.ndarray[Any, Any]]  # as the `scheduler` takes them
ModelName = Literal["scheduler", "ensemble"]
DTYPES = {"int32": "INT32", "float32": "FP32", "bool": "BOOL", "uint64": "UINT64", "object": "BYTES"}


@dataclass(slots=True)
class Answer:
    """What came of a request until its end, or until the client went away. All times are time.monotonic()."""

    responses: list[dict[str, np.ndarray[Any, Any]]] = field(default_factory=list)  # output |-> values
    error: str | None = None
    has_ended: bool = False  # False: the client went away first
    sent_at: float = 0.0
    received_at: list[float] = field(default_factory=list)  # of each response
    ended_at: float = 0.0  # of the end, or of the going away

    @property
    def output_ids(self) -> list[int]:
        return [int(token_id) for each in self.responses for token_id in each["output_ids"].reshape(-1)]

    @property
    def text(self) -> str:
        pieces = [each["text_output"].reshape(-1)[0] for each in self.responses]
        return "".join(piece.decode() if isinstance(piece, bytes) else str(piece) for piece in pieces)

    @property
    def silences(self) -> list[tuple[float, float]]:
        """From and to when nothing came."""
        return list(pairwise([self.sent_at, *self.received_at, self.ended_at]))


def make_tensors(inputs: Inputs) -> list[grpc.InferInput]:
    tensors = []
    for name, array in inputs.items():
        tensor = grpc.InferInput(name, list(array.shape), DTYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def ask(url: str, inputs: Inputs, timeout_s: float, model: ModelName = "scheduler") -> Answer:
    """Sends the request and waits for its end; after `timeout_s` the client goes away, which cancels it."""
    answer, ended, errors = Answer(), threading.Event(), []

    def receive(result: Any, error: Exception | None) -> None:
        if error is not None:
            errors.append(str(error))
            ended.set()
            return
        response = result.get_response()
        if response.outputs:
            answer.received_at.append(time.monotonic())
            answer.responses.append({output.name: result.as_numpy(output.name) for output in response.outputs})
        if response.parameters["triton_final_response"].bool_param:
            ended.set()

    if model == "ensemble":  # it has a batch dimension
        inputs = {name: array[np.newaxis] for name, array in inputs.items()}
    client = grpc.InferenceServerClient(url)
    try:
        client.start_stream(receive)
        answer.sent_at = time.monotonic()
        try:
            client.async_stream_infer(model, make_tensors(inputs), enable_empty_final_response=True)
        except InferenceServerException as error:  # nobody listens, and the stream knows it already
            receive(None, error)
        answer.has_ended = ended.wait(timeout_s)
        answer.ended_at = time.monotonic()
        client.stop_stream(cancel_requests=not answer.has_ended)
    finally:
        client.close()
    if answer.has_ended and errors:
        answer.error = errors[0]
    return answer
