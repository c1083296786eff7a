"""What the HTTP relay lets through to the Triton server: inference on the fronts, and reading about all models."""

import re

from ensemble.serving.http_messages import Refused

FRONTS = ("ensemble", "scheduler", "vllm_model")  # the models that clients may call

_VERSION = r"(?:/versions/[^/]+)?"
_INFERENCE = re.compile(rf"POST /v2/models/([^/]+){_VERSION}/(generate|generate_stream|infer)")
_READING = re.compile(
    rf"GET /v2(?:/health/(?:live|ready)|/models/stats|/models/[^/]+{_VERSION}(?:/(?:ready|config|stats))?)?"
)
_READINESS = re.compile(rf"GET /v2/(?:health|models/[^/]+{_VERSION})/ready")
_CLIENT_SHM = re.compile(
    r"(?:GET|POST) /v2/(?:system|cuda)sharedmemory(?:/region/[^/]+)?/(?:status|register|unregister)"
)


def request_of(head: bytes) -> str:
    """A request's method and path, from its head."""
    method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    return f"{method} {rest.partition(' ')[0].partition('?')[0]}"


def is_generate(request: str) -> bool:
    """Whether its body is a JSON object that may tell a request parameter."""
    match = _INFERENCE.fullmatch(request)
    return match is not None and match[2] != "infer"


def is_of_one_answer(request: str) -> bool:
    """Whether a `generate` takes one response alone."""
    return request.endswith("/generate")


def asks_whether_live(request: str) -> bool:
    return request == "GET /v2/health/live"


def asks_whether_ready(request: str) -> bool:
    return _READINESS.fullmatch(request) is not None


def check(request: str, allow_client_shm: bool) -> None:
    """Raises Refused if it may not pass."""
    inference = _INFERENCE.fullmatch(request)
    if inference is not None:
        if inference[1] not in FRONTS:
            raise Refused(403, f"model {inference[1]} is not for clients: use {' or '.join(FRONTS)}")
    elif _CLIENT_SHM.fullmatch(request):
        if not allow_client_shm:
            raise Refused(403, "clients' shared memory is off (--allow-client-shm)")
    elif not _READING.fullmatch(request):
        path = request.partition(" ")[2]
        for method, offered in (("GET", _READING), ("POST", _INFERENCE)):
            if offered.fullmatch(f"{method} {path}"):
                raise Refused(405, f"{request}: send {method}")
        raise Refused(404, f"{request} is not among what this server offers")
