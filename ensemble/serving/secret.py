"""What only the processes of one run of the server know: by it they tell each other's words from a client's.

Any client may call any model over gRPC. `prefill` and `decode` obey only calls that were sealed; what travels through
clients' reach, as handles and marks do, is signed.
"""

import contextlib
import functools
import hmac
import os
import secrets

from ensemble.errors import Forbidden
from ensemble.protocol.curve import CurveKey
from ensemble.serving.run_dir import run_dir

_NUM_BYTES = 32


def seal(payload: bytes) -> bytes:
    """A call to an inner model."""
    return _secret() + payload


def open(sealed: bytes) -> bytes:
    """The payload of a sealed call. Raises Forbidden."""
    if not hmac.compare_digest(sealed[:_NUM_BYTES], _secret()):
        raise Forbidden("calls to this model are the scheduler's alone")
    return sealed[_NUM_BYTES:]


def curve_key() -> CurveKey:
    """Of the run's sockets between machines."""
    return CurveKey.of(_secret())


def sign(text: str) -> str:
    """The text, with a signature that only this run can make."""
    return f"{text}/{hmac.digest(_secret(), text.encode(), 'sha256').hex()}"


def signed(text: str) -> str | None:
    """What was signed; None if that was not by this run."""
    content, _, _ = text.rpartition("/")
    return content if hmac.compare_digest(sign(content).encode(), text.encode()) else None


@functools.cache
def _secret() -> bytes:
    """Made by whoever needs it first, of several processes or threads."""
    path = run_dir() / "secret"
    # A name for each attempt: another thread's draft is the secret itself once it is linked, and must not be written.
    draft = path.with_name(f"secret-{secrets.token_hex(8)}")
    draft.write_bytes(secrets.token_bytes(_NUM_BYTES))
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)  # whole, or not at all
    draft.unlink()
    return path.read_bytes()
