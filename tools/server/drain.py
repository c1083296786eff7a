"""Ends what a server has to do, over the scheduler's socket in the run directory."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from ensemble.serving import control

ANSWER_S = 2.0  # for the scheduler to answer a command
LAST_WORDS_S = 1.0  # for the last errors to be handed over


def drain(run_dir: Path, timeout_s: float, goes_on: Callable[[], bool]) -> None:
    """Has new requests refused, and returns when the running ones have ended: after `timeout_s` by an error.

    So it does when the server no more `goes_on`.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(control.ControlError):  # nothing runs there any more
        num_open = _wait_until(deadline, run_dir, _tell(run_dir, control.Drain()), goes_on)
        deadline = time.monotonic() + LAST_WORDS_S
        if num_open:
            _wait_until(deadline, run_dir, _tell(run_dir, control.EndAll()), goes_on)


def _tell(run_dir: Path, command: control.Drain | control.EndAll | control.Status) -> int:
    """Returns how many requests have not ended."""
    return control.call(run_dir, command, control.Load, ANSWER_S).num_open


def _wait_until(deadline: float, run_dir: Path, num_open: int, goes_on: Callable[[], bool]) -> int:
    while num_open and time.monotonic() < deadline and goes_on():
        time.sleep(0.05)
        num_open = _tell(run_dir, control.Status())
    return num_open
