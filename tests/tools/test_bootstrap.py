"""The bootstrap: which Python it takes, what it says when there is none, and that it may be interrupted."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tools import bootstrap
from tools.bootstrap import BootstrapError, Interpreter, choose_python, install_hint

DEBIAN = {"ID": "debian", "VERSION_ID": "12"}


def interpreter(path: str, version: tuple[int, int], venv: bool = True, libpython: bool = True) -> Interpreter:
    return Interpreter(path, version, venv, libpython)


def test_the_first_usable_python_is_taken() -> None:
    found = [
        interpreter("python3", (3, 13)),
        interpreter("/a/python3.12", (3, 12), libpython=False),
        interpreter("/b/python3.12", (3, 12)),
        interpreter("python3.11", (3, 11)),
    ]
    assert choose_python(found).path == "/b/python3.12"


def test_what_is_missing_is_named_in_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_os_release", lambda: DEBIAN)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BootstrapError) as caught:
        choose_python([interpreter("/usr/bin/python3", (3, 11), venv=False, libpython=False)])
    message = str(caught.value)
    assert "/usr/bin/python3 lacks the venv package and libpython3.11.so.1.0" in message
    assert message.endswith("Run: sudo apt-get install -y python3.11 python3.11-venv libpython3.11")
    assert "\n" not in message


def test_hints_for_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ubuntu = {"ID": "ubuntu", "VERSION_ID": "24.04"}
    assert install_hint(ubuntu) == "Run: apt-get install -y python3.12 python3.12-venv libpython3.12"
    assert "uv python install" in install_hint({"ID": "void"})


def test_a_shim_that_refuses_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shims, real = tmp_path / "shims", tmp_path / "bin"
    shims.mkdir()
    real.mkdir()
    for name in ("python3", "python3.12"):
        (shims / name).write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    (real / "python3.11").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{shims}:{real}")
    monkeypatch.setattr(bootstrap, "CONTAINER", tmp_path / "absent")
    paths = bootstrap.candidates()
    assert paths == [str(shims / "python3"), str(shims / "python3.12"), str(real / "python3.11")]
    found = [bootstrap.probe(path) for path in paths]
    assert found[:2] == [None, None]
    assert found[2] is not None and found[2].version == sys.version_info[:2]


def test_an_interpreter_with_several_names_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Debian, where /bin is /usr/bin, and python3 a link to python3.11."""
    folder = tmp_path / "usr/bin"
    folder.mkdir(parents=True)
    (folder / "python3.11").write_text("#!/bin/sh\n")
    (folder / "python3.11").chmod(0o755)
    (folder / "python3").symlink_to("python3.11")
    (tmp_path / "bin").symlink_to("usr/bin")
    monkeypatch.setenv("PATH", f"{folder}:{tmp_path / 'bin'}")
    assert bootstrap.candidates() == [str(folder / "python3")]


def make_container(folder: Path, stub: str) -> Path:
    """The folders of an NVIDIA Triton image, whose stub is built for one Python."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/tritonserver").touch()
    (folder / "backends/python").mkdir(parents=True)
    (folder / "backends/python/triton_python_backend_stub").write_bytes(b"\x7fELF\0" + stub.encode() + b"\0")
    return folder


def test_in_a_container_only_the_python_of_its_stub_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container = make_container(tmp_path / "tritonserver", "libpython3.12.so.1.0")
    monkeypatch.setattr(bootstrap, "CONTAINER", container)
    monkeypatch.setattr(bootstrap, "_os_release", lambda: DEBIAN)
    found = [interpreter("/usr/bin/python3", (3, 11)), interpreter("/usr/bin/python3.12", (3, 12))]
    assert choose_python(found).path == "/usr/bin/python3.12"
    with pytest.raises(BootstrapError) as caught:
        choose_python(found[:1])
    message = str(caught.value)
    assert message.startswith("no usable Python 3.12 (none is installed)")
    assert message.endswith("uv python install 3.12")  # what Debian 12 offers is another


def test_without_any_python_make_says_how_to_install_one(tmp_path: Path) -> None:
    for program in ("sh", "make"):
        path = shutil.which(program)
        assert path is not None
        (tmp_path / program).symlink_to(path)
    makefile = Path(bootstrap.__file__).parent.parent / "Makefile"
    text = makefile.read_text().replace("/usr/bin/python3", str(tmp_path / "absent"))  # a machine that has none
    result = subprocess.run(
        ["make", "-f", "-", "demo"],
        input=text,
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: no Python 3") and "apt-get install -y python3 python3-venv" in first


def make_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    stem = f"{name}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"version = {version!r}\n")
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of our own, in place of the machine's."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(bootstrap, "VENV_PYTHON", Path(sys.executable))
    return folder


@pytest.mark.parametrize(
    ("has_gpu", "labelled", "chosen"),
    [(False, True, "99.1+cpu"), (True, True, "99.2"), (False, False, "99.2")],
)
def test_a_cpu_build_of_torch_is_preferred_without_a_gpu(
    index: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, labelled: bool, chosen: str
) -> None:
    make_wheel(index, "nvidia_cublas", "13.0")
    make_wheel(index, "torch", "99.2", requires="nvidia-cublas")
    if labelled:
        make_wheel(index, "torch", "99.1+cpu")
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: has_gpu)
    _, plan = bootstrap.plan_torch(["torch>=99"])
    versions = {item["metadata"]["name"]: item["metadata"]["version"] for item in plan}
    assert versions.pop("torch") == chosen
    assert bool(versions) == (chosen == "99.2")


BACKEND = """
import pathlib, time, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    while pathlib.Path("hang").exists() and pathlib.Path(".venv/distserve.begun").exists():
        pathlib.Path("hanging").touch()
        time.sleep(0.05)
    name = "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("toy.pth", str(pathlib.Path.cwd()))
        wheel.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n")
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    return name
build_wheel = build_editable
"""


@pytest.fixture
def project(tmp_path: Path, index: Path) -> Path:
    """A small project that the bootstrap sets up; its own build backend spares it the network."""
    make_wheel(index, "nvidia_pytriton", "0.7.0")
    make_wheel(index, "torch", "99.1+cpu")
    folder = tmp_path / "my project"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(bootstrap.__file__, folder / "tools")
    (folder / "toy_backend.py").write_text(BACKEND)
    (folder / "toy.py").write_text("here = True\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "toy_backend"\nbackend-path = ["."]\n'
    )
    return folder


def run_bootstrap(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "tools/bootstrap.py", "run"], os.environ | environment
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=240)


def imports(project: Path) -> bool:
    python = project / ".venv/bin/python"
    return subprocess.run([python, "-I", "-c", "import toy, torch, nvidia_pytriton"]).returncode == 0


def test_an_interrupted_run_is_repaired_by_the_next_and_the_one_after_has_nothing_to_do(project: Path) -> None:
    """In a directory with a space in its name."""
    (project / "hang").touch()
    command = [sys.executable, "tools/bootstrap.py", "run"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, start_new_session=True) as running:
        deadline = time.monotonic() + 60
        while not (project / "hanging").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
    assert (project / "hanging").exists()
    (project / "hang").unlink()
    again = run_bootstrap(project)
    assert again.returncode == 0, again.stderr
    assert "Making .venv" in again.stdout  # what pip had left half done is gone
    assert "pip failed" not in again.stdout  # what was planned is what was installed
    assert imports(project)
    last = run_bootstrap(project, PATH="")
    assert (last.returncode, last.stdout) == (0, ""), "it runs no program"


def test_a_failure_of_pip_ends_in_one_line_that_says_what_to_do(project: Path, index: Path) -> None:
    for wheel in index.glob("nvidia_pytriton*"):
        wheel.unlink()
    result = run_bootstrap(project)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: pip cannot resolve the packages") and "run make again" in last
    assert "nvidia-pytriton" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_compiled_is_there() -> None:
    """A failure to import it is no failure of the bootstrap."""
    assert all(importlib.util.find_spec(name.strip()) for name in bootstrap.PROGRAMS.split(","))
