"""The shell of the `preprocess` model: text or chat messages to token ids."""

import time
from functools import partial

import numpy as np
import triton_python_backend_utils as pb_utils

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError, InternalError, Overloaded
from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat
from ensemble.serving.inputs import parse_prompt
from ensemble.serving.limits import ModelLimits
from ensemble.serving.long_texts import LongTexts, prompt_bytes
from ensemble.serving.marks import ENSEMBLE_MARK, ensemble_mark
from ensemble.tokenizer import Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def refusal(error):
    triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
    return pb_utils.InferenceResponse(error=triton_error)


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        deployment = Deployment.from_environment()
        self.tokenizer = Tokenizer.from_dir(deployment.model.path)
        self.chat = ChatTemplate.from_dir(deployment.model.path)
        self.limits = ModelLimits.of(deployment, self.tokenizer)
        self.long_texts = LongTexts(self.limits.max_text_bytes)
        settle_interpreter()
        heartbeat.set_serving(True)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """None: later, by the request's sender."""
        arrival_ns = time.time_ns()
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        names = request.requested_output_names()
        if not self.long_texts.is_long(prompt_bytes(tensors)):
            return self.tokenize(tensors, names, arrival_ns)
        try:
            self.long_texts.submit(
                partial(self.answer_later, request.get_response_sender(), tensors, names, arrival_ns)
            )
        except Overloaded as error:
            return refusal(error)
        return None

    def answer_later(self, sender, tensors, names, arrival_ns):
        try:
            response = self.tokenize(tensors, names, arrival_ns)
        except Exception as error:  # nobody else would tell the client
            response = refusal(InternalError(f"{type(error).__name__}: {error}"))
        sender.send(response, flags=FINAL)

    def tokenize(self, tensors, names, arrival_ns):
        outputs = {ENSEMBLE_MARK: np.array([ensemble_mark(arrival_ns).encode()], dtype=object)}
        if "return_vllm_outputs" in names:  # of vllm_model alone
            outputs["return_vllm_outputs"] = np.ones(1, bool)
        try:
            token_ids, _ = parse_prompt(tensors, self.tokenizer, self.chat, self.limits)
            outputs["input_ids"] = np.array(token_ids, np.int32)
        except DistServeError as error:
            if prompt_bytes(tensors) > self.limits.max_text_bytes:
                return refusal(error)  # here: it is not to be copied once more
            # Without ids the scheduler meets the same error, and counts it.
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

    def finalize(self):
        self.long_texts.close()
