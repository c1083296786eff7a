"""Keeps the Triton server alive when the machine, or one stub, stands still for a second.

Release 24.10 waits a second for a stub that has a request; when neither an answer nor a sign of life has come by then,
it takes back the request's shared memory, which the stub still uses: with the stub's crash the server aborts
(boost::interprocess::lock_exception). A machine whose cores are promised twice stands still for a second now and then.
With the guard that wait is three seconds longer, and a stub that needs those has hung anyhow (watch.py).
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
BUILD_S = 30.0


def preload(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables that give the guard, built in `folder`, to a Triton server: none without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    library = folder / "stall_guard.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_S)
    except (OSError, subprocess.SubprocessError):
        return {}
    others = environment.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{library}:{others}" if others else str(library)}
