"""The shell of the `scheduler` model: Triton requests to `ensemble.serving.front_door.FrontDoor`, and answers back."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.config import Deployment
from ensemble.errors import InternalError
from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat, secret
from ensemble.serving.client_call import TritonCall
from ensemble.serving.front_door import FrontDoor
from ensemble.serving.marks import ENSEMBLE_MARK

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
            call = TritonCall(request)
            if is_warm_up(tensors):
                call.end()
            else:
                self.front_door.handle(call, tensors)

    def finalize(self):
        self.front_door.close()
