"""What travels with a request through clients' reach, signed: only this run's own are believed (secret.py)."""

from ensemble.serving import secret

CLIENT_TAG = "distserve_client_tag"  # the request parameter by which the HTTP relay finds a request again
ENSEMBLE_MARK = "ensemble_mark"  # the tensor from `preprocess` to `scheduler`


def ensemble_mark(arrival_ns: int) -> str:
    """By which the scheduler knows a request of the ensemble, and when it came (time.time_ns())."""
    return secret.sign(f"ensemble {arrival_ns}")


def read_ensemble_mark(mark: str) -> int | None:
    """arrival_ns; None: the mark is none of ours."""
    kind, _, arrival_ns = (secret.signed(mark) or "").partition(" ")
    return int(arrival_ns) if kind == "ensemble" else None


def cancel_handle(request_id: int, number: int) -> str:
    """Of one response, by its number in the window: by it `postprocess` tells what it sees (cancels.py)."""
    return secret.sign(f"handle {request_id} {number}")


def read_cancel_handle(handle: str) -> tuple[int, int] | None:
    """(request_id, number); None: the handle is none of ours."""
    kind, _, numbers = (secret.signed(handle) or "").partition(" ")
    request_id, _, number = numbers.partition(" ")
    return (int(request_id), int(number)) if kind == "handle" else None
