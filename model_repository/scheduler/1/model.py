"""The shell of the `scheduler` model: Triton requests to `ensemble.serving.scheduler.Scheduler`, and answers back."""

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.config import Deployment
from ensemble.errors import InternalError
from ensemble.serving.scheduler import Scheduler

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class ClientCall:
    """A client's request: how its answer is sent, and whether anybody still waits for it."""

    def __init__(self, request):
        self._sender = request.get_response_sender()
        self.parameters = request.parameters

    def send(self, outputs, final):
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def send_error(self, error):
        triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        self._sender.send(pb_utils.InferenceResponse(error=triton_error), flags=FINAL)

    def is_cancelled(self):
        return self._sender.is_cancelled()


def call_stage(stage, payload):
    """One unary BLS call: an encoded StageCall to its encoded StageAnswer."""
    request = pb_utils.InferenceRequest(
        model_name=stage,
        requested_output_names=["ANSWER"],
        inputs=[pb_utils.Tensor("CALL", np.frombuffer(payload, np.uint8))],
    )
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:  # the server is stopping
        raise InternalError(str(error)) from None
    if response.has_error():
        raise InternalError(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, "ANSWER").as_numpy().tobytes()


def make_family(name, description, kind):
    return pb_utils.MetricFamily(name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind.upper()))


class TritonPythonModel:
    def initialize(self, args):
        self.scheduler = Scheduler(Deployment.from_environment(), call_stage, make_family)

    def execute(self, requests):
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            self.scheduler.handle(ClientCall(request), tensors)

    def finalize(self):
        self.scheduler.close()
