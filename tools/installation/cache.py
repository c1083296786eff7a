"""The user's cache: directories that are made once from a wheel of the package index, and are complete or absent."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class DownloadError(RuntimeError):
    """The message is the operator's one line."""


def cache_dir() -> Path:
    """Where this user's downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distserve"


def make_once(target: Path, make: Callable[[Path, Path], None]) -> Path:
    """Returns the directory `target`; where it is absent, `make(work, directory)` fills it first.

    work: an empty folder that is removed afterwards. `target` appears by one rename, under a lock, whoever is
    interrupted or comes at the same time.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():  # another may have made it while we waited
            for leftover in target.parent.glob(f".{target.name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as work:
                directory = Path(work) / "made"
                directory.mkdir()
                make(Path(work), directory)
                directory.rename(target)
    return target


def download_wheel(requirement: str, directory: Path) -> Path:
    """Fetches one wheel without its dependencies, from whatever index pip is configured for. Raises DownloadError."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    result = subprocess.run([*pip, "--only-binary=:all:", "--dest", str(directory), requirement])
    if result.returncode:
        raise DownloadError(f"{requirement} could not be downloaded: pip failed, see above")
    (wheel,) = directory.glob("*.whl")
    return wheel
