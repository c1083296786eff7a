"""Where the Triton server's files are on this machine.

The program is the container's where there is one, else that of the nvidia-pytriton wheel. The environment variables
TRITONSERVER (the program) and TRITON_BACKENDS (its folder of backends) name another.
"""

import ctypes
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import DistServeError
from tools.bootstrap import CONTAINER, stub_version


class ServerError(DistServeError):
    """The server cannot be started, or ended before it was ready; the message is the operator's one line."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The files of one Triton server."""

    server: Path
    backend_files: tuple[Path, ...]  # what backends/python must hold

    @classmethod
    def find(cls) -> "Installation":
        """The server that the environment names, else the container's, else the wheel's. Raises ServerError."""
        if "TRITONSERVER" in os.environ:
            return cls.at(Path(os.environ["TRITONSERVER"]), Path(os.environ.get("TRITON_BACKENDS", "")))
        if (CONTAINER / "bin/tritonserver").exists():
            return cls.at(CONTAINER / "bin/tritonserver", CONTAINER / "backends")
        wheel = Path(sysconfig.get_path("purelib")) / "pytriton/tritonserver"
        if not wheel.exists():
            raise ServerError("no Triton server: neither an NVIDIA Triton container nor the nvidia-pytriton wheel")
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
