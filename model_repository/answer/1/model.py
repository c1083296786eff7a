"""The shell of the `answer` model: steps of the ensembles to `ensemble.serving.answer_model.AnswerModel`."""

from ensemble.interpreter import settle_interpreter
from ensemble.serving import heartbeat
from ensemble.serving.answer_model import AnswerModel
from ensemble.serving.client_call import TritonCall


class TritonPythonModel:
    def initialize(self, args):
        heartbeat.start(args["model_name"])
        self.answers = AnswerModel()
        settle_interpreter()
        heartbeat.set_serving(True)

    def execute(self, requests):
        for request in requests:
            [handle] = [tensor.as_numpy().item(0).decode(errors="replace") for tensor in request.inputs()]
            self.answers.started(handle, TritonCall(request), request.is_cancelled())

    def finalize(self):
        self.answers.close()
