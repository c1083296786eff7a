"""The shell of the `postprocess` model: passes the scheduler's outputs on, and tells it of clients that cancel."""

import triton_python_backend_utils as pb_utils

from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat
from ensemble.serving.handover import HandOver
from ensemble.serving.marks import read_cancel_handle

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        self.hand_over = HandOver()
        settle_interpreter()
        heartbeat.set_serving(True)

    def execute(self, requests):
        for request in requests:
            self.pass_on(request)

    def pass_on(self, request):
        outputs, handle = [], None
        for tensor in request.inputs():
            if tensor.name() == "cancel_handle":
                handle = read_cancel_handle(tensor.as_numpy()[0].decode())
            else:
                outputs.append(tensor)
        is_cancelled = handle is not None and handle.must_ask and request.is_cancelled()
        sender = request.get_response_sender()
        if outputs:
            sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
        else:  # a heartbeat
            sender.send(flags=FINAL)
        if handle is not None:  # after the send: the stream's next response, at another instance, comes behind this one
            self.hand_over.done(handle, is_cancelled)

    def finalize(self):
        self.hand_over.close()
