"""Answers to requests that have not been read to their end.

A connection that is closed while something of its request is unread is reset, and a client that sends all before it
reads (urllib does) loses its answer. So such an answer is followed by a while of reading, as by nginx
(`lingering_close`).
"""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 30.0
CLOSE = (b"connection", b"close")


class ReadsOn:
    """Reads up to `max_bytes` of what a request still has after its answer, for LINGER_S, and closes the connection."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        has_ended = False

        async def receive_noting_end() -> Message:
            nonlocal has_ended
            message = await receive()
            has_ended = not message.get("more_body", False)
            return message

        async def send_and_read_on(message: Message) -> None:
            if has_ended:
                await send(message)
            elif message["type"] == "http.response.start":
                await send({**message, "headers": [*message.get("headers", ()), CLOSE]})
            else:
                await send({**message, "more_body": True})
                if not message.get("more_body", False):
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._discard(receive), LINGER_S)
                    await send({"type": "http.response.body"})

        await self._app(scope, receive_noting_end, send_and_read_on)

    async def _discard(self, receive: Receive) -> None:
        num_bytes, has_ended = 0, False
        while not has_ended and num_bytes <= self._max_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            has_ended = not message.get("more_body", False)


def has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
