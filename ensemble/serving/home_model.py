"""The shell of the `prefill` and `decode` models: calls to `Home`, each answered later, from its thread."""

from typing import Any

import numpy as np

from ensemble.config import Deployment
from ensemble.errors import DistServeError, Forbidden
from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat, secret
from ensemble.serving.home import Home


class TritonPythonModel:
    """What the Triton server's Python backend asks for."""

    def initialize(self, args: dict[str, Any]) -> None:
        import triton_python_backend_utils as pb_utils  # which only a stub has

        self.pb_utils = pb_utils
        heartbeat.start(args["model_name"])
        self.home = Home(args["model_name"], Deployment.from_environment())
        self.home.wait_until_up()
        settle_interpreter()
        heartbeat.set_serving(True)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            payload = self.pb_utils.get_input_tensor_by_name(request, "CALL").as_numpy().tobytes()
            self._handle(payload, request.get_response_sender())

    def _handle(self, payload: bytes, sender: Any) -> None:
        pb_utils = self.pb_utils

        def reply(answer: bytes | DistServeError) -> None:
            if isinstance(answer, bytes):
                response = pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", np.frombuffer(answer, np.uint8))])
            else:
                error = pb_utils.TritonError(str(answer), getattr(pb_utils.TritonError, answer.code))
                response = pb_utils.InferenceResponse(error=error)
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        try:
            call = secret.open(payload)
        except Forbidden as error:
            reply(error)
        else:
            self.home.handle(call, reply)

    def is_ready(self) -> bool:  # asked by servers from release 26.03 on
        return self.home.is_up

    def finalize(self) -> None:
        self.home.close()
