"""The shell of the `postprocess` model: the scheduler's outputs under the ensemble's names."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([rename(tensor) for tensor in request.inputs()]) for request in requests]


def rename(tensor):
    return pb_utils.Tensor(tensor.name().removeprefix("scheduler_"), tensor.as_numpy())
