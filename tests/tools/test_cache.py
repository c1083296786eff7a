"""Where caches go: with any uid, with or without a home that can be written, or one line that names the variable."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny_llama
from tools.server.ports import Ports
from tools.server.run_dir import SHM

# As in a container started with a uid of its own: no entry in /etc/passwd, and 64 MiB of shared memory.
CONTAINER = """
import pwd, runpy, shutil, sys
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
disk_usage = shutil.disk_usage
shutil.disk_usage = lambda path: disk_usage(path)._replace(total=64 << 20, free=64 << 20)
"""
SHOW = """
import os
from ensemble.errors import ConfigError
from tools.installation.cache import cache_dir, ensure_home
try:
    ensure_home()
    print(os.environ.get("HOME"), cache_dir(), sep="\\n")
except ConfigError as error:
    sys.exit(f"error: {error}")
"""


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME", "LNAME")}
    kept = {name: value for name, value in kept.items() if not name.startswith(("XDG_", "HF_", "USERNAME"))}
    return kept | {"TMPDIR": str(tmp_path)} | variables


def show(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONTAINER + SHOW]
    return subprocess.run(command, env=environment(tmp_path, **variables), capture_output=True, text=True, timeout=60)


def test_a_home_that_can_be_written_is_taken(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert show(tmp_path, HOME=str(home)).stdout.split() == [str(home), str(home / ".cache/distserve")]


@pytest.mark.parametrize("home", [None, "file", "file/below"])
def test_without_one_a_folder_of_the_user_s_own_is_made_and_kept(tmp_path: Path, home: str | None) -> None:
    (tmp_path / "file").touch()
    variables = {} if home is None else {"HOME": str(tmp_path / home)}
    own = tmp_path / f"distserve-home-{os.geteuid()}"
    for _ in range(2):
        assert show(tmp_path, **variables).stdout.split() == [str(own), str(own / ".cache/distserve")]
    assert own.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    own = tmp_path / f"distserve-home-{os.geteuid()}"
    own.mkdir()
    own.chmod(0o777)
    assert "is not this user's alone; set HOME to one that can be written" in show(tmp_path).stderr
    own.rmdir()
    own.symlink_to(tmp_path)
    result = show(tmp_path)
    assert "is not this user's alone" in result.stderr and result.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    named = str(tmp_path / "file")
    result = show(tmp_path, XDG_CACHE_HOME=named)
    assert result.stderr.startswith(f"error: XDG_CACHE_HOME = {named}: {named}/distserve cannot be written; set XDG_")
    assert result.stderr.count("\n") == 1


@pytest.mark.server
def test_the_server_runs_without_a_home_or_a_passwd_entry_and_in_64_mib_of_shared_memory(tmp_path: Path) -> None:
    model, ports = make_tiny_llama(tmp_path / "model"), Ports.free()
    serve = "sys.argv[0] = 'serve'\nrunpy.run_module('tools.serve', run_name='__main__')"
    flags = ["--model", str(model), "--kv-cache-bytes", str(16 << 20)]
    flags += [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-c", CONTAINER + serve, *flags]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        variables = environment(Path(folder), HOME=str(tmp_path / "model/config.json"))
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            log = next(line.split()[1] for line in process.stdout if line.startswith("log "))
            next(line for line in process.stdout if line.startswith("curl "))
            body = json.dumps({"text_input": "Once", "max_tokens": 4, "ignore_eos": True}).encode()
            url = f"http://127.0.0.1:{ports.http}/v2/models/ensemble/generate"
            with urllib.request.urlopen(url, body, timeout=30) as answer:
                assert json.load(answer)["text_output"]
            (deployment,) = Path(folder).glob("distserve-*/deployment.yaml")
            regions = [file.stat().st_size for file in SHM.glob(f"*{deployment.parent.name}*")]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert len(regions) >= 4 and sum(regions) <= 32 << 20
    assert log == f"{folder}/distserve-home-{os.geteuid()}/.cache/distserve/server-{ports.http}.log"
