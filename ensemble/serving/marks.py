"""What travels with a request through clients' reach, signed: only this run's own are believed (secret.py)."""

from typing import NamedTuple

from ensemble.serving import secret

CLIENT_TAG = "distserve_client_tag"  # the request parameter by which the HTTP relay finds a request again
TRACE_PARENT = "traceparent"  # the request parameter, and HTTP header, that names the client's span (W3C Trace Context)
ENSEMBLE_MARK = "ensemble_mark"  # the tensor from `preprocess`, or the OpenAI front, to `scheduler`


class Mark(NamedTuple):
    """Of a request that one of our own fronts passes on."""

    arrival_ns: int  # at the front, time.time_ns()
    is_of_ensemble: bool  # else of the OpenAI front, whose gRPC stream the scheduler sees cancelled by itself


def ensemble_mark(arrival_ns: int) -> str:
    return secret.sign(f"ensemble {arrival_ns}")


def openai_mark(arrival_ns: int) -> str:
    return secret.sign(f"openai {arrival_ns}")


def read_mark(mark: str) -> Mark | None:
    """None: the mark is none of ours."""
    kind, _, arrival_ns = (secret.signed(mark) or "").partition(" ")
    return Mark(int(arrival_ns), kind == "ensemble") if kind in ("ensemble", "openai") else None


def stream_handle(request_id: int) -> str:
    """From an ensemble's first step to the one that carries the answer (ensemble_calls.py)."""
    return secret.sign(f"stream {request_id}")


def read_stream_handle(text: str) -> int | None:
    """The request's id. None: the handle is none of ours."""
    kind, _, request_id = (secret.signed(text) or "").partition(" ")
    return int(request_id) if kind == "stream" else None
