"""What the commands for an operator share: one line for each error, and a quiet end on Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import typer

from ensemble.errors import DistServeError
from tools.installation.cache import DownloadError, ensure_home

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[..., Any] | typer.Typer, foreign_options: Mapping[str, str] | None = None) -> None:
    """Runs a typer command, or an app of several, and exits; with one line on stderr, and status 1 or 2, if it cannot
    be done.

    `foreign_options`: of another program |-> how the same is said here.
    """
    allow_interrupt()
    app = main if isinstance(main, typer.Typer) else typer.Typer(add_completion=False)
    if app is not main:
        app.command()(main)
    try:
        ensure_home()
        sys.exit(typer.main.get_command(app).main(standalone_mode=False))  # 130 of one that was interrupted
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except (DistServeError, DownloadError, OSError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error has one
            raise
        option = str(getattr(error, "option_name", ""))
        ours = (foreign_options or {}).get(option.replace("_", "-"))
        message = f"{option}: here it is {ours}" if ours else error.format_message()
        if message == "Missing command.":
            message = f"a command is needed: {', '.join(typer.main.get_command(app).commands)}"  # type: ignore[attr-defined]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def allow_interrupt() -> None:
    """The next signal to stop raises KeyboardInterrupt."""
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Once: what stops on the way out is not to be interrupted."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
