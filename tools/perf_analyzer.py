"""NVIDIA's perf_analyzer, found or fetched: arguments are passed on as they are.

    python -m tools.perf_analyzer -m ensemble -u 127.0.0.1:8001 -i grpc --async --streaming --input-data FILE ...

A perf_analyzer on PATH (NVIDIA's SDK container) is taken. Elsewhere it is the one of the tritonclient 2.48.0 wheel,
the last that runs with glibc older than 2.38, in the user's cache. The two libraries it needs besides the system's,
libb64 and the CUDA runtime, are those of the server's wheel.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

from tools.installation.cache import DownloadError, cache_dir, download_wheel, make_once
from tools.installation.server_files import ensure_wheel

PACKAGE = "tritonclient==2.48.0"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}  # as in the server's wheel


def ensure_perf_analyzer() -> tuple[Path, dict[str, str]]:
    """Returns the program and the environment to run it in. Raises DownloadError."""
    installed = shutil.which("perf_analyzer")
    if installed:
        return Path(installed), dict(os.environ)
    directory = make_once(cache_dir() / "perf_analyzer-2.48.0", _make)
    paths = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return directory / "perf_analyzer", {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}


def _make(work: Path, directory: Path) -> None:
    print(f"Downloading perf_analyzer ({PACKAGE}, 13 MiB)", file=sys.stderr, flush=True)
    with zipfile.ZipFile(download_wheel(PACKAGE, work)) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
        program = directory / "perf_analyzer"
        program.write_bytes(wheel.read(member))
        program.chmod(0o755)
    for name, pattern in LIBRARIES.items():
        for library in (ensure_wheel() / "nvidia_pytriton.libs").glob(pattern):
            shutil.copy(library, directory / name)


if __name__ == "__main__":
    try:
        program, environment = ensure_perf_analyzer()
    except (OSError, DownloadError) as error:
        sys.exit(f"error: {error}")
    os.execve(program, [str(program), *sys.argv[1:]], environment)
