"""Who may call the API: those with a key, if there is one, and pages of other origins that are named."""

import hmac
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble.openai_front.errors import ApiError

TOLD_TO_PAGES = ("retry-after", "retry-after-ms", "x-request-id")


class ApiKey:
    """Lets only those below /v1 who have it. What is beside that tells no more than the metrics port does."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                error = ApiError(401, "Incorrect API key: send `Authorization: Bearer KEY`.", code="invalid_api_key")
                response = error.response()
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def guard(app: FastAPI, api_key: str | None, allowed_origins: Sequence[str]) -> None:
    """Without a key everybody may call; without origins the pages of this server alone."""
    if api_key:
        app.add_middleware(ApiKey, key=api_key)
    if allowed_origins:  # before the key: a browser asks first without it, and a page is to see that it is wrong
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=TOLD_TO_PAGES,
        )
