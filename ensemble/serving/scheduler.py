"""What the `scheduler` model does: takes clients' requests in, has the orchestrator run them, notices cancels."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError, InternalError, tell_operator
from ensemble.models.spec import load_model_spec
from ensemble.serving.cancels import CLIENT_TAG, CancelReceiver, CancelWatch
from ensemble.serving.inputs import ModelLimits, parse_request
from ensemble.serving.metrics import Ended, MakeFamily, Metrics
from ensemble.serving.orchestrator import Orchestrator
from ensemble.serving.stage_calls import CallModel
from ensemble.serving.streams import ClientCall, ClientStream, SenderPool, Timeline
from ensemble.serving.window import Window
from ensemble.tokenizer import Tokenizer


class Scheduler:
    """`handle` may be called from any thread; it returns at once, answers come later."""

    def __init__(self, deployment: Deployment, call_model: CallModel, make_family: MakeFamily | None = None) -> None:
        spec = load_model_spec(deployment.model.path)
        self._tokenizer = Tokenizer.from_dir(deployment.model.path)
        self._chat = ChatTemplate.from_dir(deployment.model.path)
        if self._chat.fault:
            tell_operator(f"`messages` cannot be served: {self._chat.fault}")
        self._limits = ModelLimits(spec.vocab_size, deployment.model.limit_model_len(spec.max_model_len))
        self._request_ids = itertools.count()
        self._senders = SenderPool(self._answered, self._send_failed)
        # Its calls fail until the Triton server, which forbids BLS while a model initialises, lets them through.
        self._orchestrator = Orchestrator(deployment, call_model, self._senders, self._count)
        self._metrics = Metrics(make_family, self._orchestrator.gauges) if make_family is not None else None
        self._window = Window()
        self._cancels = CancelReceiver(self._orchestrator.cancel, self._window.passed)
        self._watch = CancelWatch(self._orchestrator.live_streams, self._orchestrator.cancel)

    def handle(self, call: ClientCall, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes one request; every outcome, errors too, goes to `call`."""
        try:
            tag = json.loads(call.parameters()).get(CLIENT_TAG)
            client_request = parse_request(tensors, next(self._request_ids), self._tokenizer, self._chat, self._limits)
        except Exception as error:
            known = error if isinstance(error, DistServeError) else InternalError(f"{type(error).__name__}: {error}")
            call.send_error(known)
            self._count(Ended(Timeline(), 0, 0, known.code, is_error=True))
            return
        request = client_request.request
        stream = ClientStream(call, client_request, self._tokenizer, self._window, self._cancels.address)
        self._orchestrator.submit(request, stream)
        if tag is not None:
            self._cancels.watch(stream, str(tag))

    def close(self) -> None:
        self._watch.close()
        if self._metrics is not None:
            self._metrics.close()
        self._orchestrator.close()
        self._senders.close()  # what they have to say passes the window, which the receiver empties
        self._cancels.close()

    def _count(self, ended: Ended) -> None:
        if self._metrics is not None:
            self._metrics.count(ended)

    def _answered(self, stream: ClientStream) -> None:
        self._orchestrator.answered(stream.request_id)

    def _send_failed(self, stream: ClientStream, error: Exception) -> None:
        """The client is gone, or our answer is faulty."""
        stream.abort(InternalError(f"the answer could not be sent: {type(error).__name__}: {error}"))
        self._orchestrator.cancel(stream.request_id)
