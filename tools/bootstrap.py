"""Makes .venv ready for Makefile targets: `python3 tools/bootstrap.py run|ray|bench|test|check...`.

Runs under whatever python3 the machine has, with the standard library alone. It finds a Python that the Triton
server's stub can use, or says in one line how to install one; says how much it will download; installs. A second
run is instant, and an interrupted one is repaired by the next: `.venv/distserve.json` is written last, and a
virtual environment in which an installation was cut short is made anew.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
STAMP = VENV / "distserve.json"
BEGUN = VENV / "distserve.begun"
VENV_PYTHON = VENV / "bin/python"
CONTAINER = Path("/opt/tritonserver")  # where NVIDIA's images have the server
SERVER_WHEEL = "nvidia-pytriton==0.7.0"  # installed without its dependencies: of it, the server program is used
VERSIONS = ((3, 12), (3, 11), (3, 10))
EXTRAS = ("run", "ray", "bench", "test", "check")  # the first one is none of the project's
# They, and what they import, are compiled once: each process would else do so at the first start. All that is installed
# would take a minute, most of which is never imported.
PROGRAMS = "ensemble.replicas.worker, ensemble.serving.front_door, ensemble.openai_front.__main__, tools.demo"
MIB = 1 << 20

# Download sizes in MiB, where neither the file system nor the index says them; others are small.
TYPICAL_MIB = {
    "torch": 850,
    "torch+cpu": 190,
    "triton": 190,
    "nvidia-cublas": 400,
    "nvidia-cudnn": 450,
    "nvidia-cusparse": 200,
    "nvidia-cusparselt": 200,
    "nvidia-cusolver": 200,
    "nvidia-cufft": 200,
    "nvidia-nccl": 250,
    "nvidia-nvshmem": 130,
    "nvidia-curand": 65,
    "nvidia-cuda-nvrtc": 90,
    "nvidia-pytriton": 53,
    "numpy": 18,
    "transformers": 12,
    "grpcio": 7,
    "ray": 72,
    "sympy": 6,
    "mypy": 13,
    "ruff": 11,
}

# Prints what this file needs to know about an interpreter.
PROBE = """
import ctypes, importlib.util, json, os, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
folders = [sysconfig.get_config_var("LIBDIR"), sys.base_prefix + "/lib", sys.base_prefix + "/lib64"]
found = any(folder and os.path.exists(os.path.join(folder, name)) for folder in folders)
if not found:
    try:
        ctypes.CDLL(name)
        found = True
    except OSError:
        pass
has_venv = all(importlib.util.find_spec(module) for module in ("venv", "ensurepip"))
print(json.dumps({"version": sys.version_info[:2], "has_venv": has_venv, "has_libpython": found}))
"""


class Interpreter(NamedTuple):
    path: str
    version: tuple[int, int]
    has_venv: bool
    has_libpython: bool

    @property
    def lacks(self) -> str:
        """What keeps it from being used; empty if nothing does."""
        if self.version not in usable_versions():
            return "the right version"
        missing = [] if self.has_venv else ["the venv package"]
        missing += [] if self.has_libpython else [f"libpython{self.version[0]}.{self.version[1]}.so.1.0"]
        return " and ".join(missing)


class BootstrapError(Exception):
    """The message is the operator's one line; the end of a program's `output` is shown before it."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = "".join(f"{line}\n" for line in output.splitlines()[-10:])


def main(wanted: list[str]) -> None:
    with (PROJECT / "pyproject.toml").open(encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two targets started at once
        extras = installed_extras()
        if {*wanted} <= {*extras}:
            return
        if BEGUN.exists() or not probe(str(VENV_PYTHON), usable_only=True):
            make_venv(choose_python([found for path in candidates() if (found := probe(path))]))
            extras = []
        install([extra for extra in wanted if extra not in extras])
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [str(VENV_PYTHON), "-c", f"import {PROGRAMS}"]
            subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=120)
        STAMP.write_text(json.dumps({"key": stamp_key(), "extras": sorted({*extras, *wanted})}), encoding="utf-8")


# ---- which Python


def has_container_server() -> bool:
    return (CONTAINER / "bin/tritonserver").exists()


def usable_versions() -> tuple[tuple[int, int], ...]:
    """Of Python, best first: in a container the one that its stub is built for."""
    if has_container_server() and (version := stub_version(CONTAINER / "backends/python")):
        return (version,)
    return VERSIONS


def stub_version(backend: Path) -> tuple[int, int] | None:
    """The Python for which a Python backend's stub is built, by the libpython that it loads; None if it names none."""
    try:
        content = (backend / "triton_python_backend_stub").read_bytes()
    except OSError:
        return None
    named = re.search(rb"libpython3\.(\d+)\.so", content)
    return (3, int(named[1])) if named else None


def candidates() -> list[str]:
    """Interpreters by name, best first: the first python3 on PATH, then every python3.12, 3.11 and 3.10."""
    names = [f"python{major}.{minor}" for major, minor in usable_versions()]
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    paths = [path for name in ["python3", *names] for folder in folders if (path := shutil.which(name, path=folder))]
    first_names: dict[str, str] = {}  # /bin may be /usr/bin, and python3 is one of the others
    for path in paths:
        first_names.setdefault(os.path.realpath(path), path)
    return list(first_names.values())


def probe(path: str, usable_only: bool = False) -> Interpreter | None:
    """Asks an interpreter about itself; None if it will not run, as a shim without a version behind it."""
    try:
        result = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=30)
        answer = json.loads(result.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    found = Interpreter(path, tuple(answer["version"]), answer["has_venv"], answer["has_libpython"])
    return None if usable_only and found.lacks else found


def choose_python(found: list[Interpreter]) -> Interpreter:
    """The first usable interpreter. Raises BootstrapError with the command that installs one."""
    for interpreter in found:
        if not interpreter.lacks:
            return interpreter
    versions = usable_versions()
    reasons = [f"{each.path} lacks {each.lacks}" for each in found if each.version in versions]
    what = "; ".join(reasons) or "none is installed"
    wanted = " to ".join(dict.fromkeys(f"{major}.{minor}" for major, minor in (versions[-1], versions[0])))
    raise BootstrapError(f"no usable Python {wanted} ({what}). {install_hint(_os_release())}")


def install_hint(os_release: dict[str, str]) -> str:
    """The command that installs a usable Python on this distribution."""
    distribution = (os_release.get("ID", ""), os_release.get("VERSION_ID", ""))
    version = {("debian", "12"): (3, 11), ("ubuntu", "22.04"): (3, 10), ("ubuntu", "24.04"): (3, 12)}.get(distribution)
    if version is None or version not in usable_versions():
        major, minor = usable_versions()[0]
        return f"Install one with ensurepip and a shared libpython, such as by: uv python install {major}.{minor}"
    sudo = "" if os.geteuid() == 0 else "sudo "
    python = f"python{version[0]}.{version[1]}"
    return f"Run: {sudo}apt-get install -y {python} {python}-venv lib{python}"


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


# ---- the virtual environment


def stamp_key() -> str:
    """Changes with whatever an installation depends on; the path, because an editable installation holds it."""
    content = [(PROJECT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), os.fsencode(PROJECT)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def installed_extras() -> list[str]:
    if BEGUN.exists() or not VENV_PYTHON.exists():
        return []
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return list(stamp["extras"]) if stamp["key"] == stamp_key() else []


def make_venv(python: Interpreter) -> None:
    version = ".".join(map(str, python.version))
    print(f"Making .venv with Python {version} ({python.path})", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    result = subprocess.run([python.path, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if result.returncode:
        output = result.stdout + result.stderr
        raise BootstrapError(f"{python.path} -m venv failed. {install_hint(_os_release())}", output)


def install(extras: list[str]) -> None:
    """Installs the project, editable, with some of its extras; and the Triton server where there is none."""
    print("Resolving packages", flush=True)
    if pip_version() < (25, 0):  # which resolves in half the time
        result = run_pip("install", "--upgrade", "pip>=25", capture_output=True, text=True)
        if pip_version() < (23, 0):
            raise BootstrapError("pip cannot report what it would install, and there is no newer one", result.stderr)
    names = ",".join(extra for extra in extras if extra != "run")
    project = ["--editable", f".[{names}]" if names else "."]
    server = [] if has_container_server() else ["--no-deps", SERVER_WHEEL]
    chosen_torch, plan = plan_torch(project)
    if server:
        plan += resolve(server)
    downloads = [item for item in plan if "dir_info" not in item["download_info"]]  # that one is the project itself
    if downloads:
        total = sum(sizes_mib(downloads))
        print(f"Installing {len(downloads)} packages: {total:.0f} MiB, less what pip has cached", flush=True)
    quiet = [] if downloads else ["--quiet"]
    # An image may be read-only when it runs: what is not compiled by then would be compiled at every start.
    lazily = [] if has_container_server() else ["--no-compile"]
    try:
        pip("install", *quiet, "--no-input", *lazily, "--no-deps", *map(requirement, downloads), "--editable", ".")
    except BootstrapError:  # an index that wants a password for its files, say
        print("pip failed; it now resolves and installs by itself", flush=True)
        pip("install", *project, *chosen_torch)
        if server:
            pip("install", *server)


def pip_version() -> tuple[int, int]:
    result = subprocess.run([str(VENV_PYTHON), "-m", "pip", "--version"], capture_output=True, text=True)
    if result.returncode:
        raise BootstrapError(f"{VENV} is broken: remove it and run make again", result.stderr)
    major, minor = result.stdout.split()[1].split(".")[:2]
    return int(major), int(minor)


def pip(*arguments: str) -> None:
    """Runs pip with its output shown."""
    if run_pip(*arguments).returncode:
        raise BootstrapError("pip failed, see above. Check the network and pip's index, then run make again")


def run_pip(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    """In the project's directory. Only an interruption leaves BEGUN behind."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    BEGUN.touch()
    result = subprocess.run(command, cwd=PROJECT, **options)
    BEGUN.unlink()
    return result


# ---- what will be installed


def plan_torch(project: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Which torch to ask for, and what pip would then install: without a GPU a CPU build, where the index has one."""
    if not has_gpu():
        for version in cpu_builds():
            wanted = [f"torch=={version}"]
            with contextlib.suppress(BootstrapError):  # too old, say
                plan = resolve([*project, *wanted])
                if not cuda_packages(plan):
                    return wanted, plan
    plan = resolve(project)
    if not has_gpu() and cuda_packages(plan):
        print("No GPU here, but the package index has only CUDA builds of torch: they work, and are large", flush=True)
    return [], plan


def has_gpu() -> bool:
    """Whether to install for a GPU; an NVIDIA container is, though none may be there while its image is built."""
    if has_container_server():
        return True
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    program = shutil.which("nvidia-smi")
    return program is not None and b"GPU" in subprocess.run([program, "-L"], capture_output=True).stdout


def cpu_builds() -> list[str]:
    """The newest version of torch that the index offers with the label of a CPU build, if any."""
    command = [str(VENV_PYTHON), "-m", "pip", "index", "versions", "torch"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    _, _, versions = output.partition("Available versions:")
    labelled = [version.strip() for version in versions.splitlines()[0].split(",")] if versions else []
    return [version for version in labelled if version.endswith("+cpu")][:1]


def resolve(arguments: list[str]) -> list[dict[str, Any]]:
    """What pip would install, as in its report."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
    result = subprocess.run([*command, "--report=-", *arguments], cwd=PROJECT, capture_output=True, text=True)
    if result.returncode:
        message = "pip cannot resolve the packages. Check the network and pip's index, then run make again"
        raise BootstrapError(message, result.stderr)
    return list(json.loads(result.stdout)["install"])


def requirement(item: dict[str, Any]) -> str:
    """Of a planned download, so that pip does not resolve it again, which takes as long as downloading all."""
    source = item["download_info"]
    sha256 = source.get("archive_info", {}).get("hashes", {}).get("sha256")
    return f"{item['metadata']['name']} @ {source['url']}" + (f"#sha256={sha256}" if sha256 else "")


def cuda_packages(plan: list[dict[str, Any]]) -> list[str]:
    names = (item["metadata"]["name"].lower() for item in plan)
    return [name for name in names if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-pytriton"]


def sizes_mib(plan: list[dict[str, Any]]) -> list[float]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(size_mib, plan))


def size_mib(item: dict[str, Any]) -> float:
    """Of a download: from the file system or the server that has it, else what is typical."""
    url, name = item["download_info"]["url"], item["metadata"]["name"].lower().replace("_", "-")
    if url.startswith("file:"):
        return os.stat(urllib.request.url2pathname(url[len("file://") :])).st_size / MIB
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as response:
            return int(response.headers["Content-Length"]) / MIB
    except (OSError, TypeError, ValueError):
        if "+cpu" in item["metadata"]["version"]:
            name += "+cpu"
        return TYPICAL_MIB.get(name) or TYPICAL_MIB.get(name.rpartition("-cu")[0], 1)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not {*sys.argv[1:]} <= {*EXTRAS}:
        sys.exit(f"usage: python3 {sys.argv[0]} {'|'.join(EXTRAS)}...")
    try:
        main(sys.argv[1:])
    except BootstrapError as error:
        sys.exit(f"{error.output}error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run repairs what is unfinished")
