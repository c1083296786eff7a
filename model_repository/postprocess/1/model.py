"""The shell of the `postprocess` model: passes the scheduler's outputs on, and tells it of clients that cancel."""

import triton_python_backend_utils as pb_utils

from ensemble.serving import heartbeat
from ensemble.serving.cancels import CancelSender

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        self.cancels = CancelSender()
        heartbeat.set_serving(True)

    def execute(self, requests):
        for request in requests:
            self.pass_on(request)

    def pass_on(self, request):
        outputs = []
        for tensor in request.inputs():
            if tensor.name() == "cancel_handle":
                self.cancels.passed(tensor.as_numpy()[0].decode(), request.is_cancelled())
            else:
                outputs.append(tensor)
        sender = request.get_response_sender()
        if outputs:
            sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
        else:  # a heartbeat
            sender.send(flags=FINAL)

    def finalize(self):
        self.cancels.close()
