"""The endpoints."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ensemble.errors import InvalidRequest
from ensemble.openai_front.answers import ChatAnswer, CompletionAnswer
from ensemble.openai_front.errors import ApiError, answer_api_error, answer_invalid, unavailable
from ensemble.openai_front.prompts import Prompts
from ensemble.openai_front.protocol import Asked, ChatRequest, CompletionRequest, parse
from ensemble.openai_front.streaming import Delivery, merged
from ensemble.openai_front.upstream import Piece, Upstream
from ensemble.serving.marks import TRACE_PARENT
from ensemble.tokenizer import Tokenizer

BODY_TIMEOUT_S = 60.0
MAX_CHOICES = 128  # of all prompts of a request


@dataclass(frozen=True, slots=True)
class Limits:
    max_model_len: int  # tokens, prompt and output together
    max_body_bytes: int


class Front:
    """One model, as OpenAI's clients see it."""

    def __init__(self, upstream: Upstream, prompts: Prompts, tokenizer: Tokenizer, name: str, limits: Limits) -> None:
        self._upstream = upstream
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._name = name
        self._max_body_bytes = limits.max_body_bytes
        about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "distserve"}
        self._model = {**about, "max_model_len": limits.max_model_len}

    async def health(self) -> Response:
        is_ready = await self._upstream.is_ready()
        if not is_ready:
            raise unavailable("no request can be served now")
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return JSONResponse(self._model)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, CompletionAnswer)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatAnswer)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            message = f"The model `{name[:256]}` does not exist; this server has `{self._name}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _answer(
        self, request: Request, asked_kind: type[Asked], kind: type[ChatAnswer] | type[CompletionAnswer]
    ) -> Response:
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise ApiError(415, f"Content-Encoding {coding[:64]!r} is not taken here.", code="unsupported_encoding")
        body = await read_body(request, self._max_body_bytes)
        arrival_ns = time.time_ns()
        asked = parse(body, asked_kind)
        self._check_name(asked.model)
        prompts = await self._prompts.token_ids(asked)
        if len(prompts) * asked.n > MAX_CHOICES:
            raise InvalidRequest("n", asked.n, f"at most {MAX_CHOICES} answers to all {len(prompts)} prompts together")
        samplings = [asked.sampling(self._prompts.max_tokens(asked, prompt)) for prompt in prompts]
        answer = kind(asked, sum(map(len, prompts)), self._tokenizer)
        options = asked.options()
        if TRACE_PARENT in request.headers:
            options[TRACE_PARENT] = request.headers[TRACE_PARENT]
        streams = [
            self._upstream.generate(answer.id, prompt, sampling, options, arrival_ns)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        if isinstance(asked, CompletionRequest) and asked.echo and isinstance(asked.prompt[0], str):
            options["echo"] = False  # of ids alone, whose text would be without special tokens
            streams = [after(str(text), stream) for text, stream in zip(asked.prompt, streams, strict=True)]
        several = [numbered(stream, index * asked.n) for index, stream in enumerate(streams)]
        pieces = streams[0] if len(streams) == 1 else merged(several)
        return Delivery(answer, pieces, asked.stream, asked.includes_usage)


async def after(prompt: str, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """Each answer begins with the prompt."""
    begun: set[int] = set()
    async for piece in pieces:
        yield piece if piece.choice in begun else replace(piece, text=prompt + piece.text)
        begun.add(piece.choice)


async def numbered(pieces: AsyncIterator[Piece], first_choice: int) -> AsyncIterator[Piece]:
    async for piece in pieces:
        yield replace(piece, choice=first_choice + piece.choice)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError."""
    try:
        return await asyncio.wait_for(_read_all(request, max_bytes), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The request's body has not come within {BODY_TIMEOUT_S:.0f} s.", code="timeout") from None
    except ClientDisconnect:  # nobody reads it
        raise ApiError(400, "The client has gone before the end of the request's body.") from None


async def _read_all(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > max_bytes:
            raise ApiError(413, f"The request's body has more than {max_bytes} bytes.", code="too_large")
    return bytes(body)


def make_app(front: Front, upstream: Upstream) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()

    app = FastAPI(title="DistServe", openapi_url=None, lifespan=lifespan)
    app.add_api_route("/health", front.health, methods=["GET", "HEAD"])
    app.add_api_route("/v1/models", front.models, methods=["GET", "HEAD"])
    app.add_api_route("/v1/models/{name:path}", front.model, methods=["GET", "HEAD"])
    app.add_api_route("/v1/completions", front.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", front.chat_completions, methods=["POST"])
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(InvalidRequest, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(Exception, answer_fault)
    return app


async def answer_http_exception(request: Request, error: Any) -> Response:
    """What the routes refuse by themselves: a path or a method."""
    response = ApiError(error.status_code, f"Invalid URL ({request.method} {request.url.path}).").response()
    response.headers.update(error.headers or {})  # of a method those that are allowed
    return response


async def answer_fault(_: Request, error: Exception) -> Response:
    message = f"internal error: {type(error).__name__}"
    return ApiError(500, message, kind="server_error", code="internal_error").response()
