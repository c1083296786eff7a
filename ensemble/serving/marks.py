"""What travels with a request through clients' reach, signed: only this run's own are believed (secret.py)."""

from typing import NamedTuple

from ensemble.serving import secret

CLIENT_TAG = "distserve_client_tag"  # the request parameter by which the HTTP relay finds a request again
TRACE_PARENT = "traceparent"  # the request parameter, and HTTP header, that names the client's span (W3C Trace Context)
ENSEMBLE_MARK = "ensemble_mark"  # the tensor from `preprocess`, or the OpenAI front, to `scheduler`


class Mark(NamedTuple):
    """Of a request that one of our own fronts passes on: its responses carry a `cancel_handle`."""

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


class CancelHandle(NamedTuple):
    """Of one response: by it `postprocess`, or the OpenAI front, tells that it has handed it over (handover.py)."""

    request_id: int
    number: int  # of the response in its stream (pacing.py)
    must_ask: bool  # whether `postprocess` is to look for a cancel


def cancel_handle(handle: CancelHandle) -> str:
    return secret.sign(f"handle {handle.request_id} {handle.number} {handle.must_ask:d}")


def read_cancel_handle(text: str) -> CancelHandle | None:
    """None: the handle is none of ours, but a client's own."""
    kind, *numbers = (secret.signed(text) or "").split(" ")
    if kind != "handle":
        return None
    request_id, number, must_ask = map(int, numbers)
    return CancelHandle(request_id, number, bool(must_ask))
