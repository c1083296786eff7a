"""Parts of a benchmark that cannot hurt each other: each runs in a process of its own, and ends by its deadline."""

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tools.server.processes import how_it_ended

Row = dict[str, Any]
_PR_SET_PDEATHSIG = 1


def run_section(
    work: Callable[..., Iterator[Row]], arguments: tuple[Any, ...], limit_s: float, take: Callable[[Row], None]
) -> str | None:
    """Gives each row to `take` as it comes. Returns why the section did not come to its end, None if it did.

    However it ends, it is killed with all processes that it has started, but for those in sessions of their own.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments))
    process.start()
    sender.close()
    deadline = time.monotonic() + limit_s
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            said = receiver.recv()
            if not isinstance(said, dict):
                reason: str | None = said
                return reason
            take(said)
        return f"not done in {limit_s:.0f} s"
    except EOFError:
        process.join()
        return f"its process ended: {how_it_ended(process.exitcode or 0)}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()  # it may not have had its group yet
        process.join()
        receiver.close()


def _work(sender: "Connection[Any, Any]", work: Callable[..., Iterator[Row]], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    end_with_parent()
    try:
        for row in work(*arguments):
            sender.send(row)
        sender.send(None)
    except Exception as error:
        traceback.print_exc()
        sender.send(" ".join(f"{type(error).__name__}: {error}".split()))


def end_with_parent() -> None:
    """This process is terminated when the thread that started it is gone, however it ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
