"""Requests to the `scheduler` model, each on a gRPC stream of its own, so that each can be cancelled by itself.

Of each stream one response at a time is on its way: the front tells the scheduler when it has passed it on to the
client, and what comes meanwhile gathers to one response there. So no response waits here behind those of others that
nobody reads so fast, neither for this process nor for a slow client.
"""

import asyncio
import contextlib
import json
import struct
import urllib.request
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2

from ensemble.openai_front.errors import ApiError, of_the_connection, of_the_scheduler, unavailable
from ensemble.serving.handover import HandOver, ResponseHandle
from ensemble.serving.marks import ENSEMBLE_MARK, openai_mark

MODEL = "scheduler"
READY_TIMEOUT_S = 5.0
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the Triton server starts again within seconds
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_LENGTH = struct.Struct("<I")  # before each element of BYTES
_COUNT = struct.Struct("<i")  # an element of INT32


@dataclass(frozen=True, slots=True)
class Piece:
    """What one response brings of one answer."""

    choice: int
    text: str
    num_tokens: int
    finish_reason: str | None  # of its last piece
    # For each token: id |-> its `logprob` and `rank`, the sampled one first.
    log_probs: list[dict[str, dict[str, Any]]] | None


class Upstream:
    """The Triton server, which may come and go."""

    def __init__(self, grpc_url: str, ready_url: str) -> None:
        """grpc_url: host and port; ready_url: of the HTTP service, 200 while requests can be served."""
        self._channel = grpc.aio.insecure_channel(grpc_url, options=CHANNEL_OPTIONS)
        # A call with one request, which leaves with its start: to the server it is a stream that its client has closed.
        self._infer = self._channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._ready_url = ready_url
        self._hand_over = HandOver()
        self._passed: list[ResponseHandle] = []  # not yet told

    async def close(self) -> None:
        await self._channel.close()
        self._hand_over.close()

    async def is_ready(self) -> bool:
        return await asyncio.to_thread(self._ask_ready)

    def _ask_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self._ready_url, timeout=READY_TIMEOUT_S) as response:
            return bool(response.status == 200)
        return False

    async def generate(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any], options: dict[str, Any], arrival_ns: int
    ) -> AsyncIterator[Piece]:
        """Raises ApiError. Closing it, or cancelling what waits for it, cancels the request.

        arrival_ns: at the front, time.time_ns().
        """
        # Without the header `triton_grpc_error`, by which errors would have their codes: it crashes the 24.10 server.
        call = self._infer(_as_message(request_id, token_ids, sampling, options, openai_mark(arrival_ns)))
        refusal: ApiError | None = None
        num_open = int(sampling.get("n") or 1)
        try:
            async for response in call:  # to its end also after an error: what is cancelled there may crash the server
                if response.error_message:
                    refusal = of_the_scheduler(response.error_message)
                    continue
                outputs = _outputs(response.infer_response)
                for piece in _pieces(outputs):
                    num_open -= piece.finish_reason is not None
                    yield piece
                if num_open and "response_handle" in outputs:
                    self._has_passed(outputs["response_handle"])
        except grpc.aio.AioRpcError as error:
            raise of_the_connection(error.code()) from None
        finally:
            call.cancel()  # of no effect on one that has ended
        if refusal is not None:
            raise refusal
        if num_open:  # a stub that dies may leave a stream that ends as if all were well
            raise unavailable("the Triton server does not answer")

    def _has_passed(self, packed_handle: bytes) -> None:
        if not self._passed:  # all that the loop hands over in one round are told together
            asyncio.get_running_loop().call_soon(self._tell_passed)
        self._passed.append(ResponseHandle(*np.frombuffer(packed_handle, np.int64).tolist()))

    def _tell_passed(self) -> None:
        self._hand_over.passed(self._passed)
        self._passed = []


def _as_message(
    request_id: str, token_ids: list[int], sampling: dict[str, Any], options: dict[str, Any], mark: str
) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
    message.inputs.add(name="input_ids", datatype="INT32", shape=[len(token_ids)])
    message.raw_input_contents.append(np.array(token_ids, np.int32).tobytes())
    for name, text in {"sampling_parameters": json.dumps(sampling), ENSEMBLE_MARK: mark}.items():
        packed = text.encode()
        message.inputs.add(name=name, datatype="BYTES", shape=[1])
        message.raw_input_contents.append(_LENGTH.pack(len(packed)) + packed)
    if "priority" in options:  # a parameter of this name is the Triton server's own
        message.inputs.add(name="priority", datatype="INT32", shape=[1])
        message.raw_input_contents.append(_COUNT.pack(options["priority"]))
    for name in ("return_finish_reason", "return_num_output_tokens"):
        message.parameters[name].bool_param = True
    for name, value in options.items():
        if name != "priority":
            message.parameters[name].string_param = str(value)
    return message


def _outputs(response: service_pb2.ModelInferResponse) -> dict[str, bytes]:
    return {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)}


def _pieces(outputs: dict[str, bytes]) -> Iterable[Piece]:
    """Of each answer that a response's outputs are about."""
    if not outputs:  # the end of a stream alone
        return
    texts = list(_elements(outputs["text_output"]))
    reasons = list(_elements(outputs["finish_reason"]))
    counts = [count for (count,) in _COUNT.iter_unpack(outputs["num_output_tokens"])]
    indices = outputs.get("sequence_index")
    choices = [0] if indices is None else [choice for (choice,) in _COUNT.iter_unpack(indices)]
    log_probs = list(_elements(outputs["logprobs"])) if "logprobs" in outputs else []
    for position, choice in enumerate(choices):
        yield Piece(
            choice,
            texts[position].decode(),
            counts[position],
            reasons[position].decode() or None,
            json.loads(log_probs[position]) if log_probs else None,
        )


def _elements(raw: bytes) -> Iterable[bytes]:
    """Of BYTES."""
    start = 0
    while start < len(raw):
        (length,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        yield raw[start : start + length]
        start += length
