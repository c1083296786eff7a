"""The shell of the `decode` model: calls to `ensemble.serving.stage.Stage`, each answered later, from its thread."""

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.config import Deployment
from ensemble.errors import Forbidden
from ensemble.serving import heartbeat, secret
from ensemble.serving.stage import Stage

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def reply_by(sender):
    def reply(answer):
        if isinstance(answer, bytes):
            response = pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", np.frombuffer(answer, np.uint8))])
        else:
            error = pb_utils.TritonError(str(answer), getattr(pb_utils.TritonError, answer.code))
            response = pb_utils.InferenceResponse(error=error)
        sender.send(response, flags=FINAL)

    return reply


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        self.stage = Stage("decode", Deployment.from_environment())
        self.stage.wait_until_up()
        heartbeat.set_serving(True)

    def execute(self, requests):
        for request in requests:
            reply = reply_by(request.get_response_sender())
            try:
                call = secret.open(pb_utils.get_input_tensor_by_name(request, "CALL").as_numpy().tobytes())
            except Forbidden as error:
                reply(error)
                continue
            self.stage.handle(call, reply)

    def is_ready(self):  # asked by servers from release 26.03 on
        return self.stage.is_up

    def finalize(self):
        self.stage.close()
