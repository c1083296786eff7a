"""Who may call: by key, and from which pages."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from ensemble.openai_front.access import guard

PAGE = {"origin": "https://chat.example.org"}


def client(api_key: str | None = None, *origins: str) -> TestClient:
    app = FastAPI()
    for path in ("/health", "/v1/models"):
        app.add_api_route(path, lambda: "found")
    guard(app, api_key, origins)
    return TestClient(app)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic schlüssel", "schlüssel"])
def test_without_the_key_nothing_below_v1(header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/models", "/%76%31/models", "/v1/other"):
        answer = client("schlüssel").get(path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")


def test_with_it_everything_and_health_without() -> None:
    guarded = client("schlüssel")
    for scheme in ("Bearer", "bearer"):
        assert guarded.get("/v1/models", headers={"authorization": f"{scheme} schlüssel".encode()}).json() == "found"
    assert guarded.get("/health").json() == "found"
    assert client().get("/v1/models").json() == "found"


def test_pages_of_named_origins_may_call_and_see_that_a_key_is_wrong() -> None:
    asks_first = {**PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    named = client("key", "https://chat.example.org")
    answer = named.options("/v1/models", headers=asks_first)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
    assert answer.headers["access-control-allow-headers"] == "authorization"
    refused = named.get("/v1/models", headers=PAGE)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE["origin"])
    assert client(None, "*").get("/health", headers=PAGE).headers["access-control-allow-origin"] == "*"
    for other in (client(), client(None, "https://other.example.org")):
        assert "access-control-allow-origin" not in other.get("/health", headers=PAGE).headers
