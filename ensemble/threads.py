"""Threads that the process cannot do without."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from ensemble.errors import ERROR_MARK

# Told of the reason before the process ends, so that others can read it: see serving/heartbeat.py.
before_the_end: list[Callable[[str], None]] = []


def end_process(reason: str) -> NoReturn:
    """The reason becomes the operator's one line."""
    for tell in before_the_end:
        tell(reason)
    print(f"{ERROR_MARK} {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def start_vital_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread whose failure ends the process, with a reason: none is dead behind a green light."""

    def run_or_end_the_process() -> None:
        try:
            run()
        except BaseException as error:
            traceback.print_exc()
            end_process(f"thread {name}: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run_or_end_the_process, name=name, daemon=True)
    thread.start()
    return thread
