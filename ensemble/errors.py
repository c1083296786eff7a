"""Every error a client or an operator can meet, in one hierarchy.

Each class carries the Triton error code its response gets; `retry_after_s` is the hint given with refusals that
time will cure. How a message begins tells the HTTP relay its status (serving/http_contract.py), since the Triton server
makes a 400 of every error inside an ensemble.
"""

import reprlib
from typing import Any, Literal

_SHORT = reprlib.Repr()  # a client's value may be huge, or nested deeper than repr() follows
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
ERROR_MARK = "distserve: error:"  # in the server's log; tools.serve shows what follows as the reason of a failed start
NO_RAY = "launcher = ray: Ray is not installed. Run: make serve LAUNCHER=ray, or: pip install -e '.[ray]'"
ErrorCode = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL", "UNSUPPORTED"]


def sendable(text: str) -> str:
    """As UTF-8 can have it: a path may hold bytes that stand for themselves, and a client's JSON half a character."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()


class DistServeError(Exception):
    """Base of all errors that are part of the interface. `code` is the name of a Triton error code."""

    code: ErrorCode = "INTERNAL"

    def __str__(self) -> str:
        return sendable(super().__str__())


class ConfigError(DistServeError):
    """The deployment cannot work as written; the message names the field, the value and what is allowed."""

    code: ErrorCode = "INVALID_ARG"


class ModelError(ConfigError):
    """The model directory is missing, incomplete, or of an architecture that is not supported."""


class InvalidRequest(DistServeError):
    """A request field has a value that is not allowed."""

    code: ErrorCode = "INVALID_ARG"

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        shown = _SHORT.repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} = {shown} is not valid: {allowed}")
        self.field = field


class Forbidden(DistServeError):
    """A client called what is not for clients."""

    code: ErrorCode = "INVALID_ARG"


class Overloaded(DistServeError):
    """A bounded queue is full; the request was not accepted."""

    code: ErrorCode = "UNAVAILABLE"

    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__(f"overloaded: {what}; retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class TargetOutOfReach(Overloaded):
    """The request would miss a target of its own or of the deployment; nothing of it was computed."""

    def __init__(self, target: str, target_s: float, predicted_s: float, retry_after_s: float) -> None:
        what = f"{target} = {1e3 * target_s:g} cannot be met: {1e3 * predicted_s:.1f} ms are predicted"
        super().__init__(what, min(max(retry_after_s, 0.1), 60.0))


class StageUnavailable(DistServeError):
    """A stage has no live worker, or the worker that held the request is gone."""

    code: ErrorCode = "UNAVAILABLE"

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage} is unavailable: {reason}")
        self.stage = stage


class TransferError(DistServeError):
    """A sequence's KV does not come over: from its source to a replica that is to go on with it."""

    code: ErrorCode = "UNAVAILABLE"


class PullRefused(TransferError):
    """A reference to blocks that are not, or not any more, what it takes them for. Others are not concerned."""


class LinkBroken(TransferError):
    """Nothing comes from that replica as things stand: it does not answer in time, or not understandably."""


class Cancelled(DistServeError):
    """The client cancelled the request."""

    code: ErrorCode = "CANCELLED"


class DeadlineExceeded(DistServeError):
    """The request's own `timeout_ms` has passed.

    The code is CANCELLED: the server has none for deadlines, and UNAVAILABLE (HTTP 503) would have clients and proxies
    send again, to a server that is behind, what nobody waits for any more.
    """

    code: ErrorCode = "CANCELLED"


class InternalError(DistServeError):
    """A fault of ours; the message says where."""

    def __init__(self, where: str) -> None:
        super().__init__(f"internal error: {where}")
