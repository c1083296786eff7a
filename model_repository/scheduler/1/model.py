"""The shell of the `scheduler` model: Triton requests to `ensemble.serving.front_door.FrontDoor`, and answers back."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.config import Deployment
from ensemble.errors import InternalError
from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat, secret
from ensemble.serving.front_door import FrontDoor
from ensemble.serving.marks import ENSEMBLE_MARK

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class ClientCall:
    """A client's request: how its answer is sent, and whether anybody still waits for it."""

    def __init__(self, request):
        self._sender = request.get_response_sender()
        # Not the request itself: as long as that is there, its inputs are in shared memory.
        self.request_id, self.parameters = request.request_id(), request.parameters()

    def send(self, outputs, final):
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def send_error(self, error):
        triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        self._sender.send(pb_utils.InferenceResponse(error=triton_error), flags=FINAL)

    def end(self):
        self._sender.send(flags=FINAL)

    def is_cancelled(self):
        return self._sender.is_cancelled()


may_call = threading.Event()  # the server has begun to give us requests, or has had the time to
MAX_S_TO_FIRST_REQUEST = 3.0  # after `initialize`: a warm-up that is lost must not keep all calls back for ever


def call_stage(stage, payload):
    """One unary BLS call: an encoded StageCall to its encoded StageAnswer.

    None leaves before the first request, that of the model's warm-up, or a while after `initialize`: the 24.10 server
    may crash when a call reaches it in the midst of that.
    """
    if not may_call.is_set():
        raise InternalError("the server is still starting")
    request = pb_utils.InferenceRequest(
        model_name=stage,
        requested_output_names=["ANSWER"],
        inputs=[pb_utils.Tensor("CALL", np.frombuffer(secret.seal(payload), np.uint8))],
    )
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:  # the server is stopping
        raise InternalError(str(error)) from None
    if response.has_error():
        raise InternalError(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, "ANSWER").as_numpy().tobytes()


def is_warm_up(tensors):
    """As config.pbtxt has it: an empty mark alone."""
    return list(tensors) == [ENSEMBLE_MARK] and not any(tensors[ENSEMBLE_MARK])


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        self.front_door = FrontDoor(Deployment.from_environment(), call_stage)
        settle_interpreter()
        opening = threading.Timer(MAX_S_TO_FIRST_REQUEST, may_call.set)
        opening.daemon = True
        opening.start()

    def execute(self, requests):
        may_call.set()
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            call = ClientCall(request)
            if is_warm_up(tensors):
                call.end()
            elif "stream_handle" in tensors:
                handle = tensors["stream_handle"].item(0).decode(errors="replace")
                self.front_door.started(handle, call, request.is_cancelled())
            else:
                self.front_door.handle(call, tensors)

    def finalize(self):
        self.front_door.close()
