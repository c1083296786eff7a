"""The shell of the `postprocess` model: the scheduler's outputs under the ensemble's names, and the client's cancel."""

import triton_python_backend_utils as pb_utils

from ensemble.serving.cancels import CancelSender

CANCEL_HANDLE = "scheduler_cancel_handle"
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        self.cancels = CancelSender()

    def execute(self, requests):
        for request in requests:
            self.pass_on(request)

    def pass_on(self, request):
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        handle = tensors.pop(CANCEL_HANDLE).as_numpy()[0].decode()
        self.cancels.check(handle, request.is_cancelled)
        sender = request.get_response_sender()
        if not tensors:  # a heartbeat
            sender.send(flags=FINAL)
            return
        outputs = [
            pb_utils.Tensor(name.removeprefix("scheduler_"), tensor.as_numpy()) for name, tensor in tensors.items()
        ]
        sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)

    def finalize(self):
        self.cancels.close()
