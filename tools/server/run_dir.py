"""The run directory from its making to its removal, with all that a server leaves elsewhere.

Whoever made it holds a lock on its file `owner`. When that process is gone, a reaper (`python -m tools.server.run_dir
DIR`, waiting on a pipe) ends what still runs and removes everything; should it be killed too, the next server's start
does.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.server.processes import end_processes

SHM = Path("/dev/shm")
TMP = Path("/tmp")  # whatever TMPDIR says, the Python backend makes an empty folder here
CLOCK_TICK_S = 0.05  # by which a file's time may lag behind
GRACE_S = 3.5  # from SIGTERM until what is left is killed


class RunDir:
    """One, and the right to it."""

    def __init__(self) -> None:
        folder = tempfile.gettempdir()  # a short one: sockets' paths are limited to 107 bytes
        folder = folder if len(folder) <= 40 else str(TMP)
        sweep(Path(folder))
        self.path = Path(tempfile.mkdtemp(prefix="distserve-", dir=folder))  # mode 0700
        draft = self.path / "owner.new"
        self._owner = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        draft.rename(self.path / "owner")
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "tools.server.run_dir", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # else who reads what we print would wait for its end, too
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )

    def server_starts(self) -> None:
        (self.path / "starting").write_bytes(b"")
        (self.path / "ready").unlink(missing_ok=True)  # of the life before

    def server_is_ready(self) -> None:
        (self.path / "ready").write_bytes(b"")

    def remove_leftovers_of_server(self) -> None:
        """Of one that was cut short and is to be started again."""
        remove_shared_memory(self.path)
        remove_environment_folder(self.path)
        shutil.rmtree(self.path / "stubs", ignore_errors=True)
        for socket in self.path.glob("answer-*"):  # of processes that are no more
            socket.unlink(missing_ok=True)

    def remove(self, grace_s: float) -> None:
        """Ends what still runs, and leaves nothing."""
        leave_nothing(self.path, grace_s)
        os.close(self._owner)
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()


def running_servers() -> dict[Path, int]:
    """Run directories of this user's servers on this machine, and the HTTP port of each."""
    found = {}
    for file in {
        *Path(tempfile.gettempdir()).glob("distserve-????????/http-port"),
        *TMP.glob("distserve-????????/http-port"),
    }:
        with contextlib.suppress(OSError, ValueError):  # another user's, or it is being removed
            found[file.parent] = int(file.read_text(encoding="utf-8"))
    return found


def sweep(folder: Path) -> None:
    """Removes the run directories whose owners, and their reapers, were killed."""
    for owner in folder.glob("distserve-????????/owner"):
        with contextlib.suppress(OSError):  # another user's; or it lives; or it is being removed
            if owner.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leave_nothing(owner.parent, grace_s=0.0)
            finally:
                os.close(descriptor)


def leave_nothing(run_dir: Path, grace_s: float) -> None:
    """Ends the processes of a run, and removes what they leave. Safe to repeat, and beside another."""
    killed = end_processes(run_dir, grace_s)
    for pid in killed:  # what torch and CUDA leave of a process that exported memory
        for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
            for region in SHM.glob(pattern):
                region.unlink(missing_ok=True)
    remove_shared_memory(run_dir)
    if killed:
        remove_environment_folder(run_dir)
    shutil.rmtree(run_dir, ignore_errors=True)


def shm_prefix(run_dir: Path) -> str:
    return f"triton_python_backend_shm_region_{run_dir.name}_"


def remove_shared_memory(run_dir: Path) -> None:
    for region in SHM.glob(f"{shm_prefix(run_dir)}*"):
        region.unlink(missing_ok=True)


def remove_environment_folder(run_dir: Path) -> None:
    """Removes what a server that was killed leaves in /tmp, told by its age: its name says not whose it is."""
    with contextlib.suppress(FileNotFoundError):
        earliest_s = (run_dir / "starting").stat().st_mtime
        ready = run_dir / "ready"
        latest_s = ready.stat().st_mtime if ready.exists() else float("inf")
        for folder in TMP.glob("python_env_??????"):
            with contextlib.suppress(OSError):  # gone, or not empty
                status = folder.stat()
                if status.st_uid == os.geteuid() and earliest_s - CLOCK_TICK_S <= status.st_mtime <= latest_s:
                    folder.rmdir()


if __name__ == "__main__":
    sys.stdin.buffer.read()  # until whoever holds the other end is gone
    leave_nothing(Path(sys.argv[1]), GRACE_S)
