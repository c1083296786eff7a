"""What the `scheduler` model does: takes clients' requests in, has the orchestrator run them, notices cancels."""

import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError, InternalError
from ensemble.models.spec import load_model_spec
from ensemble.serving.cancels import CHECK_INTERVAL_S, CancelReceiver
from ensemble.serving.inputs import ModelLimits, parse_request
from ensemble.serving.metrics import Ended, MakeFamily, Metrics
from ensemble.serving.orchestrator import CallModel, Orchestrator
from ensemble.serving.streams import ClientCall, ClientStream, SenderPool
from ensemble.tokenizer import Tokenizer


class Scheduler:
    """`handle` may be called from any thread; it returns at once, answers come later."""

    def __init__(self, deployment: Deployment, call_model: CallModel, make_family: MakeFamily | None = None) -> None:
        spec = load_model_spec(deployment.model.path)
        self._deployment = deployment
        self._call_model = call_model
        self._make_family = make_family  # None: metrics are off
        self._metrics: Metrics | None = None
        self._tokenizer = Tokenizer.from_dir(deployment.model.path)
        self._chat = ChatTemplate.from_dir(deployment.model.path)
        self._limits = ModelLimits(spec.vocab_size, deployment.model.limit_model_len(spec.max_model_len))
        self._request_ids = itertools.count()
        self._senders = SenderPool(self._stopped, self._send_failed)
        self._orchestrator: Orchestrator | None = None
        self._cancels = CancelReceiver(self._cancel)
        self._closing = threading.Event()

    def handle(self, call: ClientCall, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes one request; every outcome, errors too, goes to `call`."""
        try:
            client_request = parse_request(tensors, next(self._request_ids), self._tokenizer, self._chat, self._limits)
        except DistServeError as error:
            call.send_error(error)
            return
        except Exception as error:
            call.send_error(InternalError(f"{type(error).__name__}: {error}"))
            return
        request = client_request.request
        stream = ClientStream(call, client_request, self._tokenizer, self._cancels.handle_for(request.request_id))
        self._started().submit(request, stream)

    def close(self) -> None:
        self._closing.set()
        if self._metrics is not None:
            self._metrics.close()
        if self._orchestrator is not None:
            self._orchestrator.close()
        self._cancels.close()
        self._senders.close()

    def _started(self) -> Orchestrator:
        """The orchestrator, made at the first request: the Triton server forbids BLS while a model initialises."""
        if self._orchestrator is None:
            self._orchestrator = Orchestrator(self._deployment, self._call_model, self._senders, self._count)
            if self._make_family is not None:
                self._metrics = Metrics(self._make_family, self._orchestrator.gauges)
            threading.Thread(target=self._watch_cancels, name="cancel-watch", daemon=True).start()
        return self._orchestrator

    def _count(self, ended: Ended) -> None:
        if self._metrics is not None:
            self._metrics.count(ended)

    def _watch_cancels(self) -> None:
        """`is_cancelled` is a round trip to the Triton server: asked from here alone, each stream in turn."""
        assert self._orchestrator is not None
        while not self._closing.is_set():
            started = time.monotonic()
            for stream in self._orchestrator.live_streams():
                if stream.is_cancelled():
                    self._cancel(stream.request_id)
            self._closing.wait(max(0.0, CHECK_INTERVAL_S - (time.monotonic() - started)))

    def _stopped(self, stream: ClientStream) -> None:
        if self._orchestrator is not None:
            self._orchestrator.stop(stream.request_id)

    def _send_failed(self, stream: ClientStream, error: Exception) -> None:
        """The client is gone, or our answer is faulty: either way nobody reads on."""
        self._cancel(stream.request_id)

    def _cancel(self, request_id: int) -> None:
        if self._orchestrator is not None:
            self._orchestrator.cancel(request_id)
