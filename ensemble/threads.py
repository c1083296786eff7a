"""Threads that the process cannot do without."""

import os
import threading
from collections.abc import Callable
from typing import NoReturn

from ensemble.operator_log import log_exception, tell_operator

# Told of the reason before the process ends, so that others can read it: see serving/heartbeat.py.
before_the_end: list[Callable[[str], None]] = []


def end_process(reason: str) -> NoReturn:
    """The reason becomes the operator's one line."""
    for tell in before_the_end:
        tell(reason)
    tell_operator(f"error: {reason}")
    os._exit(1)


def start_vital_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread whose failure ends the process, with a reason: none is dead behind a green light."""

    def run_or_end_the_process() -> None:
        try:
            run()
        except BaseException as error:
            log_exception()
            end_process(f"thread {name}: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run_or_end_the_process, name=name, daemon=True)
    thread.start()
    return thread
