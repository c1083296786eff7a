"""Threads that the process cannot do without."""

import os
import sys
import threading
import traceback
from collections.abc import Callable

from ensemble.errors import ERROR_MARK


def start_vital_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread whose failure ends the process, with a reason: none is dead behind a green light."""

    def run_or_end_the_process() -> None:
        try:
            run()
        except BaseException as error:
            traceback.print_exc()
            print(f"{ERROR_MARK} {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    thread = threading.Thread(target=run_or_end_the_process, name=name, daemon=True)
    thread.start()
    return thread
