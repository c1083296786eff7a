"""The user's cache: directories that are made once from a wheel of the package index, and are complete or absent.

A user may have no home that can be written: any uid of a container, a read-only root. Ours and the libraries' caches
(Triton kernels, torch, the Hugging Face Hub) then go to a folder of that user's own among the temporary files.
"""

import fcntl
import getpass
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ensemble.errors import ConfigError


class DownloadError(RuntimeError):
    """The message is the operator's one line."""


def ensure_home() -> None:
    """Gives this process, and those that it starts, a HOME that can be written, and a user's name. Raises ConfigError.

    To be called before libraries are imported that read HOME then, as huggingface_hub does.
    """
    try:
        home = str(Path.home())
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        home = ""
    if not home or not can_be_made(Path(home) / ".cache"):
        os.environ["HOME"] = str(temporary_home())
    try:
        getpass.getuser()
    except (KeyError, OSError):  # which class depends on Python's version
        os.environ["USER"] = str(os.geteuid())


def temporary_home() -> Path:
    """A folder that is this user's alone, kept from one start to the next. Raises ConfigError."""
    try:
        path = Path(tempfile.gettempdir()) / f"distserve-home-{os.geteuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"no folder for caches: {error}; set HOME and TMPDIR to folders that can be written"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(f"no folder for caches: {path} is not this user's alone; set HOME to one that can be written")
    return path


def cache_dir() -> Path:
    """Where this user's downloads are kept. Raises ConfigError."""
    named = os.environ.get("XDG_CACHE_HOME")
    path = Path(named or Path.home() / ".cache") / "distserve"
    if not can_be_made(path):
        variable = f"XDG_CACHE_HOME = {named}" if named else f"HOME = {Path.home()}"
        raise ConfigError(f"{variable}: {path} cannot be written; set XDG_CACHE_HOME to a folder that can be")
    return path


def can_be_made(folder: Path) -> bool:
    """Whether files can be written there, once the folder has been made."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


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
