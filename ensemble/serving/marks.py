"""What travels with a request through clients' reach, signed: only this run's own are believed (secret.py)."""

from typing import NamedTuple

from ensemble.serving import secret

CLIENT_TAG = "distserve_client_tag"  # the request parameter by which the HTTP relay finds a request again
TRACE_PARENT = "traceparent"  # the request parameter, and HTTP header, that names the client's span (W3C Trace Context)
ENSEMBLE_MARK = "ensemble_mark"  # the tensor from `preprocess` to `scheduler`


def ensemble_mark(arrival_ns: int) -> str:
    """By which the scheduler knows a request of the ensemble, and when it came (time.time_ns())."""
    return secret.sign(f"ensemble {arrival_ns}")


def read_ensemble_mark(mark: str) -> int | None:
    """arrival_ns; None: the mark is none of ours."""
    kind, _, arrival_ns = (secret.signed(mark) or "").partition(" ")
    return int(arrival_ns) if kind == "ensemble" else None


class CancelHandle(NamedTuple):
    """Of one response: by it `postprocess` tells that it has handed it over, and what it sees (handover.py)."""

    request_id: int
    number: int  # of the response in its stream (pacing.py)
    must_ask: bool  # whether to look for a cancel


def cancel_handle(handle: CancelHandle) -> str:
    return secret.sign(f"handle {handle.request_id} {handle.number} {handle.must_ask:d}")


def read_cancel_handle(text: str) -> CancelHandle | None:
    """None: the handle is none of ours, but a client's own."""
    kind, *numbers = (secret.signed(text) or "").split(" ")
    if kind != "handle":
        return None
    request_id, number, must_ask = map(int, numbers)
    return CancelHandle(request_id, number, bool(must_ask))
