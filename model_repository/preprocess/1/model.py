"""The shell of the `preprocess` model: text or chat messages to token ids."""

import contextlib

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError
from ensemble.serving.inputs import parse_prompt
from ensemble.tokenizer import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        path = Deployment.from_environment().model.path
        self.tokenizer = Tokenizer.from_dir(path)
        self.chat = ChatTemplate.from_dir(path)

    def execute(self, requests):
        return [self.tokenize(request) for request in requests]

    def tokenize(self, request):
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        outputs = {name: np.ones(1, bool) for name in ("return_cancel_handle", "return_vllm_outputs")}
        with contextlib.suppress(DistServeError):  # without ids the scheduler meets the same error, and counts it
            token_ids, _ = parse_prompt(tensors, self.tokenizer, self.chat)
            outputs["input_ids"] = np.array(token_ids, np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
