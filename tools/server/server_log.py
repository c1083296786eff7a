"""What a server's processes have written into its log: lines for the operator, and why it ended."""

import re
from pathlib import Path

from ensemble.errors import ERROR_MARK

MARK = "distserve: "  # of lines that are for the operator
# What is in the log of every start on a machine without GPU, and no reason of anything.
NO_REASON = re.compile("CUDA|NVML|DCGM", re.IGNORECASE)
LAST_CRY = re.compile("ASSERTION FAILED|terminate called|what\\(\\):")


class ServerLog:
    """An empty file at first; of a server that is started again what it has written since. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0  # bytes that are of earlier lives
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def begin_life(self) -> None:
        self._start = self.path.stat().st_size

    def operator_lines(self) -> list[str]:
        lines = self._lines()
        return [line.removeprefix(MARK) for line in lines if line.startswith(MARK) and not line.startswith(ERROR_MARK)]

    def error(self, *, was_ready: bool) -> str | None:
        """What a process of ours gave as the reason of its end."""
        lines = [line.removeprefix(ERROR_MARK).strip() for line in self._lines() if line.startswith(ERROR_MARK)]
        return (lines[-1] if was_ready else lines[0]) if lines else None  # a start fails by its first

    def why_it_ended(self, how: str, *, was_ready: bool) -> str:
        """Of the Triton server; `how` is what is known without the log."""
        if (error := self.error(was_ready=was_ready)) is not None:
            return error
        lines = self._lines()
        if was_ready:
            cries = [line.strip() for line in lines if LAST_CRY.search(line)]
            return f"{how}: {cries[-1]}" if cries else how
        errors = [line for line in lines if line.startswith("E") and "] " in line and not NO_REASON.search(line)]
        return errors[-1].split("] ", 1)[1].strip('" ') if errors else how

    def _lines(self) -> list[str]:
        with self.path.open("rb") as log:
            log.seek(self._start)
            return log.read().decode("utf-8", errors="replace").splitlines()
