"""`pip install .` gives a command that serves, from the installed files alone; and where its server comes from."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import openai
import pytest

from tests.checkpoints import make_tiny_llama
from tools.distserve import COMMANDS
from tools.installation import server_files
from tools.server.ports import free_ports

ROOT = Path(__file__).parents[2]
PACKAGED = ("ensemble", "kernels", "tools", "model_repository")


@pytest.fixture(scope="module")
def distserve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in a virtual environment of its own, which finds the other packages in this one."""
    folder = tmp_path_factory.mktemp("installed")
    source, venv = folder / "source", folder / "venv"
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", venv / "bin/python", "install", *offline, wheel], check=True, timeout=120)
    shutil.rmtree(source)
    here, there = (Path(sysconfig.get_path("purelib", vars=vars)) for vars in ({}, {"base": str(venv)}))
    (there / "packages.pth").write_text(f"{here}\n")
    for name in ("pytriton", "nvidia_pytriton.libs"):
        (there / name).symlink_to(here / name)
    return venv / "bin/distserve"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


def test_its_help_and_version(distserve: Path) -> None:
    assert run(distserve, "--version").stdout == "distserve 0.1.0\n"
    told = run(distserve)
    assert told.returncode == 0
    assert re.findall(r"^  (\w+)  ", told.stdout, re.MULTILINE) == list(COMMANDS)
    unknown = run(distserve, "server")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: no command 'server': one of serve, chat, client, bench, fleet, demo\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_program(name: str) -> None:
    command = COMMANDS[name]
    assert callable(getattr(importlib.import_module(command.module), command.attribute))


@pytest.mark.server
def test_it_serves_talks_and_lists_replicas(distserve: Path, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    flags = dict(zip(("http", "grpc", "metrics", "openai"), free_ports(4), strict=True))
    command = [distserve, "serve", model, *(f"--{name}-port={port}" for name, port in flags.items())]
    command += ["--kv-cache-bytes", str(16 << 20), "--log", tmp_path / "log"]
    command += ["--served-model-name", "mine", "--api-key", "secret", "--no-page"]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = next(line.split()[1] for line in server.stdout if line.startswith("HTTP "))
        next(line for line in server.stdout if not line.strip())  # before the first request that it prints
        answer = run(distserve, "client", "Hello", "--url", url, "--max-tokens", "4")
        fleet = run(distserve, "fleet", "list", "--http-port", str(flags["http"]))
        front = f"http://127.0.0.1:{flags['openai']}"
        with openai.OpenAI(base_url=f"{front}/v1", api_key="secret", max_retries=0, timeout=60) as client:
            named = client.completions.create(model="mine", prompt="Hello", max_tokens=4)
            with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
                client.with_options(api_key="guessed").completions.create(model="mine", prompt="Hello")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(front, timeout=10)
        with urllib.request.urlopen(f"http://127.0.0.1:{flags['metrics']}/metrics", timeout=10) as page:
            labels = set(re.findall(r'^vllm:.*model_name="([^"]*)"', page.read().decode(), re.MULTILINE))
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    assert (named.model, labels) == ("mine", {"mine"})
    assert re.search(r"^0 +prefill +up ", fleet.stdout, re.MULTILINE), fleet.stdout + fleet.stderr


def test_without_the_servers_wheel_it_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download_wheel(requirement: str, folder: Path) -> Path:
        calls.append(requirement)
        path = folder / "server.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, mode in {"pytriton/tritonserver/bin/tritonserver": 0o755, "pytriton/triton.py": 0o644}.items():
                member = zipfile.ZipInfo(name)
                member.external_attr = mode << 16
                wheel.writestr(member, "content")
        return path

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(server_files, "download_wheel", download_wheel)
    monkeypatch.setattr(server_files.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    folder = server_files.ensure_wheel()
    assert server_files.ensure_wheel() == folder
    assert calls == [server_files.SERVER_WHEEL]
    assert os.access(folder / "pytriton/tritonserver/bin/tritonserver", os.X_OK)
    assert not (folder / "pytriton/triton.py").exists()
