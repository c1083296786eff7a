"""Proofs in several parts, each of which runs whatever becomes of the others."""

import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ensemble.errors import ConfigError
from tools.benchmarks.results import write_results

Row = dict[str, Any]
Section = Callable[[Path, Path], Iterable[Row]]  # a folder of its own, and one for logs |-> its rows


def run_sections(
    sections: Mapping[str, Section],
    only: Collection[str] | None,  # None: all
    output: Path | None,
    log_dir: Path | None,  # None: logs are not kept
) -> None:
    """Prints each row when it is there, with the seconds so far, and writes it; exit status 1 if a goal was missed.

    An exception becomes a row. Raises ConfigError for a section that there is not.
    """
    if unknown := sorted({*(only or ())} - {*sections}):
        raise ConfigError(f"--only {', '.join(unknown)}: must be of {', '.join(sections)}")
    console, rows, start = Console(width=170, highlight=False), list[Row](), time.monotonic()

    def add(row: Row) -> None:
        rows.append(row)
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        told = f"{row['name']:95} {row['value']} {row['unit']} {row.get('seen') or ''}"
        console.print(f"{time.monotonic() - start:6.1f} s  {met:3} {told}", soft_wrap=True)
        if output is not None:
            write_results(output, rows)  # a run that is cut off leaves what it has

    for name in only or sections:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            logs = log_dir or Path(folder)
            logs.mkdir(parents=True, exist_ok=True)
            try:
                for row in sections[name](Path(folder), logs):
                    add(row)
            except Exception as error:  # the other sections' results are worth having
                add(failed(name, error))
        add({"name": f"{name}: time of this part", "value": round(time.monotonic() - begin), "unit": "s"})
    if not all(row.get("met") in (None, True) for row in rows):
        raise typer.Exit(1)


def failed(name: str, error: Exception) -> Row:
    """Instead of what the error kept from being measured; its traceback goes to standard error."""
    traceback.print_exception(error)
    return {"name": f"{name}: ran", "value": str(error), "unit": "", "goal": "to its end", "met": False}
