"""The life of a Triton server: start, ready, early death with its reason, and an end that leaves nothing."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from ensemble.config import Deployment
from ensemble.listener import MAX_FILES
from tools.installation import server_files as installation
from tools.installation.server_files import Installation, ServerError
from tools.server.answers import MAX_SILENCE_S, RELAY, TRITON_SERVER
from tools.server.ports import Ports
from tools.server.processes import limit_file_size, session_pids
from tools.server.run_dir import SHM
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_INT32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_INT32 dims: [-1] }]
"""
DOUBLE = """
import os, pathlib, subprocess, sys, time
import triton_python_backend_utils as pb_utils
from ensemble.config import Deployment

class TritonPythonModel:
    def initialize(self, args):
        Deployment.from_environment()
        subprocess.Popen(["sleep", "600"])  # a worker that does not end by itself
        print("distserve: loading", file=sys.stderr, flush=True)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)]) for x in inputs]

    def finalize(self):
        time.sleep(0.5)
        pathlib.Path(__file__).with_name("finalized").touch()
"""
FAILING = """
import os, sys
class TritonPythonModel:
    def initialize(self, args):
        {failure}
    def execute(self, requests):
        return []
"""


def make_repository(folder: Path, source: str) -> Path:
    (folder / "double/1").mkdir(parents=True)
    (folder / "double/config.pbtxt").write_text(CONFIG)
    (folder / "double/1/model.py").write_text(source)
    return folder


@pytest.fixture
def deployment() -> Deployment:
    stage = {"devices": ["cpu"]}
    return Deployment.parse({"model": {"path": "/unused"}, "prefill": stage, "decode": stage})


def double(server: TritonServer, values: list[int]) -> list[int]:
    tensor = {"name": "x", "datatype": "INT32", "shape": [len(values)], "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    url = f"{server.direct_http_url}/v2/models/double/infer"  # the relay passes calls of our own fronts alone
    with urllib.request.urlopen(url, body, timeout=30) as response:
        return list(json.load(response)["outputs"][0]["data"])


def traces(run_dir: Path) -> list[Path]:
    """What a server has left on this machine."""
    return [path for path in [run_dir, *SHM.iterdir()] if run_dir.name in path.name and path.exists()]


def test_serves_and_leaves_nothing(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "a model repository", DOUBLE)
    seen: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))  # a shell's
    with TritonServer(deployment, model_repository=repository, log_path=tmp_path / "log") as server:
        server.wait_ready(seen.append, timeout_s=120)
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0] == min(MAX_FILES, limits[1])
        assert double(server, [1, 2, 3]) == [2, 4, 6]
        with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
            assert b"nv_inference_request_success" in response.read()
        run_dir, pid = server.run_dir, server.pid
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert len(str(run_dir)) < 60
        assert len(list(session_pids(pid))) >= 3  # the server, its stub, the worker
        assert len(traces(run_dir)) >= 2
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert (repository / "double/1/finalized").exists()  # nobody killed the stub before
    assert seen == ["loading"]
    assert not list(session_pids(pid))
    assert not traces(run_dir)
    server.stop()  # safe to repeat


def test_a_killed_server_leaves_nothing_either(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    environments = set(Path("/tmp").glob("python_env_*"))
    with TritonServer(deployment, model_repository=repository) as server:
        server.wait_ready(timeout_s=120)
        environments = set(Path("/tmp").glob("python_env_*")) - environments  # its own, and those of other servers
        assert environments
        run_dir, pid = server.run_dir, server.pid
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == "the Triton server ended: killed by signal 9, SIGKILL"
    assert not list(session_pids(pid))
    assert not traces(run_dir)
    assert not all(folder.exists() for folder in environments)


def test_without_the_relay_the_port_is_the_triton_servers_own(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    with TritonServer(deployment, model_repository=repository, http_relay=False) as server:
        server.wait_ready(timeout_s=120)
        assert server.http_url == server.direct_http_url
        assert double(server, [3]) == [6]


def test_what_has_ended_or_hangs_is_started_again_and_nothing_else(
    tmp_path: Path, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    with TritonServer(deployment, model_repository=repository) as server:
        server.wait_ready(timeout_s=120)
        ports, pid, relay_pid = server.ports, server.pid, server.relay_pid
        os.kill(relay_pid, signal.SIGKILL)
        assert server.wait() == "the HTTP relay ended: killed by signal 9, SIGKILL"
        server.restart()
        server.wait_ready(timeout_s=120)
        assert (server.ports, server.pid) == (ports, pid)
        relay_pid = server.relay_pid
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == "the Triton server ended: killed by signal 9, SIGKILL"
        server.restart()
        assert not list(session_pids(pid))
        server.wait_ready(timeout_s=120)
        assert (server.ports, server.relay_pid) == (ports, relay_pid)
        assert double(server, [5]) == [10]
        pid = server.pid
        os.kill(relay_pid, signal.SIGSTOP)
        monkeypatch.setitem(MAX_SILENCE_S, RELAY, 1.0)
        assert f"the HTTP relay (process {relay_pid}) has answered nothing for " in server.wait()
        monkeypatch.undo()
        server.restart()
        server.wait_ready(timeout_s=120)
        assert (server.ports, server.pid) == (ports, pid)
        assert server.relay_pid != relay_pid
        relay_pid = server.relay_pid
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setitem(MAX_SILENCE_S, TRITON_SERVER, 1.0)
        assert f"the Triton server (process {pid}) has answered nothing for " in server.wait()
        monkeypatch.undo()
        server.restart()
        assert not list(session_pids(pid))
        server.wait_ready(timeout_s=120)
        assert (server.ports, server.relay_pid) == (ports, relay_pid)
        assert double(server, [6]) == [12]


def test_two_servers_at_once(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    servers = [TritonServer(deployment, model_repository=repository) for _ in range(2)]
    with servers[0] as first, servers[1] as second:
        first.wait_ready(timeout_s=120)
        second.wait_ready(timeout_s=120)
        assert double(first, [1]) == double(second, [1]) == [2]
        os.kill(first.pid, signal.SIGKILL)
        first.stop()
        assert double(second, [4]) == [8]
        started = time.monotonic()
        second.stop()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            "print(\"distserve: error: model.path = 'x': no such directory\", file=sys.stderr); sys.exit(1)",
            r"model\.path = 'x': no such directory",
        ),
        ('raise ValueError("what is wrong")', r"failed to load 'double' version 1: .*ValueError: what is wrong.*"),
        ("os._exit(3)", r"failed to load 'double' version 1: .*"),
    ],
)
def test_an_early_end_is_told_in_one_line(tmp_path: Path, deployment: Deployment, failure: str, reason: str) -> None:
    repository = make_repository(tmp_path / "models", FAILING.format(failure=failure))
    with (
        TritonServer(deployment, model_repository=repository) as server,
        pytest.raises(ServerError) as caught,
    ):
        server.wait_ready(timeout_s=120)
    assert re.fullmatch(reason, str(caught.value))


def test_the_environment_may_name_another_server(
    tmp_path: Path, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a copy of the same one, laid out as a server that somebody has built."""
    installed = Installation.find()
    program, backend = tmp_path / "tritonserver", tmp_path / "backends/python"
    program.symlink_to(installed.server)
    backend.mkdir(parents=True)
    for file in installed.backend_files:
        (backend / file.name).symlink_to(file)
    monkeypatch.setenv("TRITONSERVER", str(program))
    monkeypatch.setenv("TRITON_BACKENDS", str(backend.parent))
    repository = make_repository(tmp_path / "models", DOUBLE)
    with TritonServer(deployment, model_repository=repository) as server:
        server.wait_ready(timeout_s=120)
        assert double(server, [21]) == [42]
    monkeypatch.setenv("TRITON_BACKENDS", str(tmp_path / "absent"))
    with pytest.raises(ServerError, match="absent"):
        Installation.find()


def test_an_installed_server_is_used_if_its_stub_is_for_this_python(
    tmp_path: Path, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as in NVIDIA's images."""
    wheel = Installation.find()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tritonserver").symlink_to(wheel.server)
    backend = tmp_path / "backends/python"
    backend.mkdir(parents=True)
    for file in wheel.backend_files:
        (backend / file.name).symlink_to(file)
    monkeypatch.setattr(installation, "CONTAINER", tmp_path)
    found = Installation.find()
    assert found.server == tmp_path / "bin/tritonserver"
    assert {file.parent for file in found.backend_files} == {backend}
    with TritonServer(deployment, model_repository=make_repository(tmp_path / "models", DOUBLE)) as server:
        server.wait_ready(timeout_s=120)
        assert double(server, [7]) == [14]
    (backend / "triton_python_backend_stub").unlink()
    (backend / "triton_python_backend_stub").write_bytes(b"libpython3.9.so.1.0")
    with pytest.raises(ServerError, match=r"built for Python 3\.9, and this is Python 3\.\d+"):
        Installation.find()


def test_a_port_in_use_is_named(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        free = Ports.free()
        server = TritonServer(deployment, model_repository=repository, ports=Ports(free.http, port, free.metrics))
        with pytest.raises(ServerError, match=f"port {port} is in use"):
            server.start()


def test_a_smaller_limit_of_files_stays() -> None:
    """An operator's own; a larger one than the hard limit could not be set either."""
    with subprocess.Popen(["sleep", "60"]) as process:
        for num_bytes, limited in ((4096, 4096), (8192, 4096), (1024, 1024)):
            limit_file_size(process.pid, num_bytes)
            assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] == limited
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (512, 512))
        limit_file_size(process.pid, 1024)
        assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE) == (512, 512)
        process.kill()


KILLED = """
import os, signal, subprocess, sys
from tools.server.run_dir import RunDir
from ensemble.serving.run_dir import RUN_DIR_VARIABLE
run = RunDir()
listen = "import socket, sys, time; s = socket.create_server(('', int(sys.argv[1]))); print(flush=True); time.sleep(99)"
environment = {**os.environ, RUN_DIR_VARIABLE: str(run.path)}
command = [sys.executable, "-c", listen, sys.argv[1]]
child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=-3)
child.stdout.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_ports_of_a_killed_server_are_free_for_the_next_one_at_once(tmp_path: Path, deployment: Deployment) -> None:
    """Though what it left has not ended yet."""
    repository = make_repository(tmp_path / "models", DOUBLE)
    ports = Ports.free()
    subprocess.run([sys.executable, "-c", KILLED, str(ports.grpc)], check=False, timeout=60)
    with TritonServer(deployment, model_repository=repository, ports=ports) as server:
        assert server.poll() is None


@pytest.mark.parametrize("host", ["::", "::1"])
def test_ipv6(tmp_path: Path, deployment: Deployment, host: str) -> None:
    """Every front; `::` takes HTTP clients of both kinds."""
    repository = make_repository(tmp_path / "models", DOUBLE)
    with TritonServer(deployment, model_repository=repository, host=host) as server:
        server.wait_ready(timeout_s=120)
        assert double(server, [5]) == [10]
        assert grpc.InferenceServerClient(server.grpc_url).is_server_ready()
        if host == "::":
            with urllib.request.urlopen(f"{server.http_url.replace('[::1]', '127.0.0.1')}/v2/health/ready") as answer:
                assert answer.status == 200


def test_a_host_that_is_not_this_machines_is_named(tmp_path: Path, deployment: Deployment) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE)
    for host in ("192.0.2.1", "2001:db8::1", "no.such.host.invalid"):
        with pytest.raises(ServerError, match=f"host {host}: "):
            TritonServer(deployment, model_repository=repository, host=host).start()


def test_free_ports_are_three_that_can_be_bound() -> None:
    for _ in range(50):
        ports = Ports.free()
        numbers = {ports.http, ports.grpc, ports.metrics}
        assert len(numbers) == 3
        for number in numbers:
            with socket.create_server(("127.0.0.1", number)):
                pass


STARTER = """
import sys, time
from pathlib import Path
from ensemble.config import Deployment
from tools.server.triton_server import TritonServer
stage = {"devices": ["cpu"]}
deployment = Deployment.parse({"model": {"path": "/unused"}, "prefill": stage, "decode": stage})
server = TritonServer(deployment, model_repository=Path(sys.argv[1]))
server.start()
server.wait_ready()
print(server.pid, server.run_dir, flush=True)
time.sleep(600)
"""


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "models", DOUBLE.replace('subprocess.Popen(["sleep", "600"])', "pass"))
    command = [sys.executable, "-c", STARTER, str(repository)]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as starter:
            assert starter.stdout is not None
            pid = int(starter.stdout.readline().split()[0])
            starter.kill()
        deadline = time.monotonic() + 20
        while list(session_pids(pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not list(session_pids(pid))
