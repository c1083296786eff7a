"""How answers go out: server-sent events, and the end of a request whose client closes its connection."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ensemble.openai_front.answers import Answer, Json
from ensemble.openai_front.errors import ApiError
from ensemble.openai_front.upstream import Piece

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
DONE = b"data: [DONE]\n\n"
MAX_MERGED = 64  # pieces that wait for the client, of a request with several prompts
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Delivery(Response):
    """Sends an answer while its client is there.

    An error before the first piece is an answer with a status of its own; a later one is an event, the last.
    """

    def __init__(self, answer: Answer, pieces: AsyncIterator[Piece], streams: bool, includes_usage: bool) -> None:
        super().__init__()
        self._answer = answer
        self._pieces = pieces
        self._streams = streams
        self._includes_usage = includes_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._deliver(scope, receive, send))

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._pieces):  # type: ignore[type-var]
            if self._streams:
                await self._stream(send)
            else:
                body = await self._answer.whole(self._pieces)
                await JSONResponse(body, headers={"x-request-id": self._answer.id})(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        events = self._events()
        first = await anext(events)
        headers = [*EVENT_STREAM, (b"x-request-id", self._answer.id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": _event(error.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """The bytes of one or several events at a time."""
        head = _dumps(self._answer.chunk_head())[:-1]
        usage = ',"usage":null' if self._includes_usage else ""
        async for piece in self._pieces:
            choices = self._answer.chunk_choices(piece)
            yield "".join(f'data: {head},"choices":[{_dumps(each)}]{usage}}}\n\n' for each in choices).encode()
        if self._includes_usage:
            yield _event({**self._answer.chunk_head(), "choices": [], "usage": self._answer.usage()})
        yield DONE


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, None]) -> None:
    """Cancels the work when the client is gone. The request's body has to have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return
        task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """The pieces of all as they come. The first error ends all."""
    ready: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(MAX_MERGED)

    async def pass_on(stream: AsyncIterator[Piece]) -> None:
        try:
            async for piece in stream:
                await ready.put(piece)
            await ready.put(None)
        except Exception as error:
            await ready.put(error)

    tasks = [asyncio.ensure_future(pass_on(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            match await ready.get():
                case None:
                    num_open -= 1
                case Exception() as error:
                    raise error
                case Piece() as piece:
                    yield piece
    finally:
        for task in tasks:
            task.cancel()


def _event(body: Json) -> bytes:
    return f"data: {_dumps(body)}\n\n".encode()
