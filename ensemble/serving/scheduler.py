"""What the `scheduler` model does: takes clients' requests in, has the router run them, notices cancels."""

import itertools
import json
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import DistServeError, InternalError
from ensemble.models.spec import load_model_spec
from ensemble.router.lives import Timeline
from ensemble.serving.cancels import CLIENT_TAG, CancelReceiver, CancelWatch
from ensemble.serving.choices import Choices
from ensemble.serving.exchange import CallModel
from ensemble.serving.fields import OF_THE_SERVER
from ensemble.serving.inputs import ModelLimits, parse_request
from ensemble.serving.metrics import Ended, MakeFamily, Metrics
from ensemble.serving.router_thread import RouterThread
from ensemble.serving.streams import ClientCall, ClientStream, SenderPool
from ensemble.serving.window import Window
from ensemble.tokenizer import Tokenizer


class Scheduler:
    """`handle` may be called from any thread; it returns at once, answers come later."""

    def __init__(self, deployment: Deployment, call_model: CallModel, make_family: MakeFamily | None = None) -> None:
        spec = load_model_spec(deployment.model.path)
        self._tokenizer = Tokenizer.from_dir(deployment.model.path)
        self._chat = ChatTemplate.from_dir(deployment.model.path)
        if self._chat.fault:
            print(f"distserve: `messages` cannot be served: {self._chat.fault}", file=sys.stderr, flush=True)
        max_model_len = deployment.model.limit_model_len(spec.max_model_len)
        self._limits = ModelLimits(spec.vocab_size, max_model_len, spec.eos_token_ids)
        self._request_ids = itertools.count(secrets.randbits(40) << 20)  # no other run's: stages may outlive this one
        self._senders = SenderPool(self._answered, self._send_failed)
        # Its calls fail until the Triton server, which forbids BLS while a model initialises, lets them through.
        self._router = RouterThread(deployment, call_model, self._senders, self._request_ids.__next__, self._count)
        self._metrics = Metrics(make_family, self._router.gauges) if make_family is not None else None
        self._window = Window()
        self._cancels = CancelReceiver(self._router.cancel, self._window.passed)
        self._watch = CancelWatch(self._router.live_streams, self._router.cancel)

    def handle(self, call: ClientCall, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes one request; every outcome, errors too, goes to `call`."""
        try:
            parameters = json.loads(call.parameters())
            tag = parameters.pop(CLIENT_TAG, None)
            own = {name: value for name, value in parameters.items() if not OF_THE_SERVER.fullmatch(name)}
            request_id = next(self._request_ids)
            client_request = parse_request(tensors, own, request_id, self._tokenizer, self._chat, self._limits)
        except Exception as error:
            known = error if isinstance(error, DistServeError) else InternalError(f"{type(error).__name__}: {error}")
            call.send_error(known)
            self._count(Ended(Timeline(), 0, 0, known.code, is_error=True))
            return
        choices = [client_request]
        if client_request.num_choices > 1:
            more = range(1, client_request.num_choices)
            choices += [client_request.nth_choice(choice, next(self._request_ids)) for choice in more]
            request_ids = [each.request.request_id for each in choices]
            call = Choices(call, request_ids, client_request.options.stream, self._router.cancel)
        streams = [ClientStream(call, each, self._tokenizer, self._window, self._cancels.address) for each in choices]
        for stream in streams:
            self._router.submit(stream.request, stream)
        if tag is not None:
            self._cancels.watch(call if isinstance(call, Choices) else streams[0], str(tag))

    def close(self) -> None:
        self._watch.close()
        if self._metrics is not None:
            self._metrics.close()
        self._router.close()
        self._senders.close()  # what they have to say passes the window, which the receiver empties
        self._cancels.close()

    def _count(self, ended: Ended) -> None:
        if self._metrics is not None:
            self._metrics.count(ended)

    def _answered(self, stream: ClientStream) -> None:
        self._router.answered(stream.request_id)

    def _send_failed(self, stream: ClientStream, error: Exception) -> None:
        """The client is gone, or our answer is faulty."""
        stream.abort(InternalError(f"the answer could not be sent: {type(error).__name__}: {error}"))
        self._router.cancel(stream.request_id)
