"""Signs of life of a stub: a file that says which process it is, that its interpreter goes on, and whether it serves.

`tools.serve` watches the files and ends a server of which a stub has ended or stands still: the Triton server itself
notices neither. The HTTP relay answers readiness by them. Nothing here waits, or imports anything of the engine.
"""

import faulthandler
import mmap
import os
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ensemble.errors import ERROR_MARK
from ensemble.serving.run_dir import run_dir

INTERVAL_S = 0.1
STACKS_SIGNAL = signal.SIGUSR1  # a stub that gets it writes the stacks of its threads into the server's log
_PID, _COUNT, _IS_SERVING = struct.Struct("<Q"), struct.Struct("<Q"), struct.Struct("<?")
_COUNT_AT, _IS_SERVING_AT, _REASON_AT, _NUM_BYTES = 8, 16, 24, 512


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a file says."""

    model: str
    pid: int
    count: int  # of intervals in which the interpreter ran
    is_serving: bool  # it has loaded, and takes requests
    reason: str  # why it ended itself; empty: it has not


def beats_folder(of_run: Path) -> Path:
    return of_run / "stubs"


def start(model: str) -> None:
    """Begins this process's file, and the thread that counts. Once, first of all in a model's `initialize`."""
    global _file
    path = beats_folder(run_dir()) / f"{model}-{os.getpid()}"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(bytes(_NUM_BYTES))
    with path.open("r+b") as file:
        _file = mmap.mmap(file.fileno(), _NUM_BYTES)
    _PID.pack_into(_file, 0, os.getpid())
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    threading.Thread(target=_count, args=(_file,), name="heartbeat", daemon=True).start()


def set_serving(is_serving: bool) -> None:
    """True when the model has loaded; of the scheduler also false whenever no request could be served."""
    if _file is not None:
        _IS_SERVING.pack_into(_file, _IS_SERVING_AT, is_serving)


def fail(reason: str) -> NoReturn:
    """Ends this process, which has to be started again with its server. The reason becomes the operator's one line."""
    if _file is not None:
        text = reason.encode()[: _NUM_BYTES - _REASON_AT]
        _file[_REASON_AT : _REASON_AT + len(text)] = text
    print(f"{ERROR_MARK} {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def read_heartbeats(of_run: Path) -> dict[Path, Heartbeat]:
    """Those of a run, by file."""
    found = {}
    for path in sorted(beats_folder(of_run).glob("*-*")):
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # the server is being started again
            continue
        if len(data) == _NUM_BYTES and (pid := _PID.unpack_from(data)[0]):
            (count,), (is_serving,) = _COUNT.unpack_from(data, _COUNT_AT), _IS_SERVING.unpack_from(data, _IS_SERVING_AT)
            reason = data[_REASON_AT:].rstrip(b"\0").decode(errors="replace")
            found[path] = Heartbeat(path.name.rpartition("-")[0], pid, count, is_serving, reason)
    return found


_file: mmap.mmap | None = None


def _count(file: mmap.mmap) -> NoReturn:
    count = 0
    while True:
        count += 1
        _COUNT.pack_into(file, _COUNT_AT, count)
        time.sleep(INTERVAL_S)
