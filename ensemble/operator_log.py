"""The server's log, which is the stderr of all its processes.

It takes what it can. A log that cannot be written, as on a full disk, costs lines and nothing else: an OSError out of
here would end the thread that starts replicas again, or keep a process that has failed from ending.
"""

import contextlib
import sys
import traceback

from ensemble.errors import sendable


def tell_operator(text: str) -> None:
    """Writes a line that tools.serve shows, in UTF-8 whatever the locale."""
    _write(f"distserve: {sendable(text)}\n")


def log_exception() -> None:
    """Writes the traceback of the exception that is being handled."""
    _write(sendable(traceback.format_exc()))


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.buffer.write(text.encode())
        sys.stderr.flush()
