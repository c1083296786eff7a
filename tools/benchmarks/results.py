"""The one form of docs/results/*.json: where, with what, of which commit, by which command, and the rows."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

PACKAGES = ("torch", "triton", "numpy", "nvidia-pytriton", "tritonclient")


def write_results(path: Path, rows: list[dict[str, Any]], device: str | None = None) -> None:
    """Writes the rows: each has name, value, unit, and goal and met, None where there is no goal."""
    arguments = [_as_documented(argument, path) for argument in sys.argv[1:]]
    program = sys.modules["__main__"].__spec__  # None: it was not started by -m
    command = ["python", "-m", program.name if program is not None else sys.argv[0], *arguments]
    result = {
        "device": device or device_name(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit(),
        "command": " ".join(command),
        "rows": [{"goal": None, "met": None} | row for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def report(rows: list[dict[str, Any]], output: Path | None, device: str | None = None) -> None:
    """Prints the rows and writes them if there is a file; exit status 1 if a goal was missed."""
    console = Console(highlight=False)
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        console.print(f"{met:3} {row['name']:60} {row['value']} {row['unit']}", soft_wrap=True)
    if output is not None:
        write_results(output, rows, device)
    if not all(row.get("met") in (None, True) for row in rows):
        raise typer.Exit(1)


def exactly(name: str, value: float, unit: str, goal: float) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": value == goal}


def at_most(name: str, value: float, unit: str, goal: float) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": value <= goal}


def at_least(name: str, value: float, unit: str, goal: float) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": value >= goal}


def device_name() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {platform.machine()} CPU"


def commit() -> str:
    """The commit that is measured, marked where files differ from it; COMMIT where the checkout has no history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    head, changes = (
        subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return (head or "unknown") + (" with changes" if changes else "")


def _as_documented(argument: str, output: Path) -> str:
    """Where the file belongs, not where it lay on the machine that wrote it; of other absolute paths the last name."""
    if argument == str(output):
        return f"docs/results/{output.name}"
    return Path(argument).name if Path(argument).is_absolute() else argument


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
