"""A request of the Triton server, as the shells of `scheduler` and `answer` hand it on. Runs in a stub alone."""

from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from ensemble.errors import DistServeError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonCall:
    """How its answer is sent, and whether anybody still waits for it."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        # Not the request itself: as long as that is there, its inputs are in shared memory.
        self.request_id, self.parameters = request.request_id(), request.parameters()

    def send(self, outputs: dict[str, npt.NDArray[Any]], final: bool) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def send_error(self, error: DistServeError) -> None:
        triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        self._sender.send(pb_utils.InferenceResponse(error=triton_error), flags=FINAL)

    def end(self) -> None:
        self._sender.send(flags=FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())
