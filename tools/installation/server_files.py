"""Where the Triton server's files are on this machine.

The program is the container's where there is one, else that of the nvidia-pytriton wheel: installed beside the packages
(`make` does that), or fetched into the user's cache. The environment variables TRITONSERVER (the program) and
TRITON_BACKENDS (its folder of backends) name another.
"""

import ctypes
import os
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import DistServeError
from tools.bootstrap import CONTAINER, SERVER_WHEEL, stub_version
from tools.installation.cache import cache_dir, download_wheel, make_once

WHEEL_FOLDERS = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")  # what a server needs of it
WHEEL_MIB = 53


class ServerError(DistServeError):
    """The server cannot be started, or ended before it was ready; the message is the operator's one line."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The files of one Triton server."""

    server: Path
    backend_files: tuple[Path, ...]  # what backends/python must hold

    @classmethod
    def find(cls) -> "Installation":
        """The server that the environment names, else the container's, else the wheel's.

        Raises ServerError; DownloadError, if the wheel is not there and cannot be fetched.
        """
        if "TRITONSERVER" in os.environ:
            return cls.at(Path(os.environ["TRITONSERVER"]), Path(os.environ.get("TRITON_BACKENDS", "")))
        if (CONTAINER / "bin/tritonserver").exists():
            return cls.at(CONTAINER / "bin/tritonserver", CONTAINER / "backends")
        wheel = ensure_wheel() / "pytriton/tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.exists():
            raise ServerError(f"the nvidia-pytriton wheel has no Python backend stub for Python {version}")
        names = ("libtriton_python.so", "triton_python_backend_utils.py")
        return cls(wheel / "bin/tritonserver", (*(wheel / "backends/python" / name for name in names), stub))

    @classmethod
    def at(cls, server: Path, backends: Path) -> "Installation":
        """A server program with its folder of backends. Raises ServerError."""
        backend = backends / "python"
        if not backend.is_dir():
            raise ServerError(f"{server} has no Python backend: {backend} is absent (see TRITON_BACKENDS)")
        version = stub_version(backend)
        if version is not None and version != sys.version_info[:2]:
            ours = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise ServerError(f"{backend} is built for Python {version[0]}.{version[1]}, and this is Python {ours}")
        return cls(server, tuple(backend.iterdir()))


def ensure_wheel() -> Path:
    """The folder that holds WHEEL_FOLDERS; the wheel is fetched where it is not installed. Raises DownloadError."""
    installed = Path(sysconfig.get_path("purelib"))
    if (installed / WHEEL_FOLDERS[0]).is_dir():
        return installed
    return make_once(cache_dir() / SERVER_WHEEL.replace("==", "-"), _unpack_wheel)


def _unpack_wheel(work: Path, directory: Path) -> None:
    print(f"Downloading the Triton server ({SERVER_WHEEL}, {WHEEL_MIB} MiB)", file=sys.stderr, flush=True)
    with zipfile.ZipFile(download_wheel(SERVER_WHEEL, work)) as wheel:
        for member in wheel.infolist():
            if member.filename.startswith(WHEEL_FOLDERS) and not member.is_dir():
                path = Path(wheel.extract(member, directory))
                path.chmod(0o755 if member.external_attr >> 16 & 0o111 else 0o644)


def find_libpython() -> Path | None:
    """The shared library of this interpreter, which the stub loads; None if it is on the loader's own path already."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    found = next((path for folder in folders if folder and (path := Path(folder) / name).exists()), None)
    if found is None:
        try:
            ctypes.CDLL(name)
        except OSError:
            raise ServerError(f"{name} is missing, which the server's Python stub loads: see `make serve`") from None
    return found
