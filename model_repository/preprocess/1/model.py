"""The shell of the `preprocess` model: text to token ids."""

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.config import Deployment
from ensemble.errors import DistServeError
from ensemble.serving.inputs import parse_text
from ensemble.tokenizer import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        self.tokenizer = Tokenizer.from_dir(Deployment.from_environment().model.path)

    def execute(self, requests):
        return [self.tokenize(request) for request in requests]

    def tokenize(self, request):
        try:
            text = parse_text(pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy())
        except DistServeError as error:
            code = getattr(pb_utils.TritonError, error.code)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        outputs = {
            "input_ids": np.array(self.tokenizer.encode(text), np.int32),
            "return_cancel_handle": np.ones(1, bool),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
