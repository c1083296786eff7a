"""Starts, watches and stops the real Triton server: used by `tools.serve`, `tools.demo` and the tests alike.

What a server leaves on disk lies in one private run directory, which `stop` removes:

    /tmp/distserve-XXXXXXXX/     mode 0700; the server's TMPDIR, short because sockets' paths are limited to 107 bytes
        deployment.yaml          what the models read
        models                   link to the model repository, whose own path may hold spaces: stubs cannot have them
        backends/python/         links to the Python backend and to the stub for this interpreter's version
        lib/libpython3.X.so.1.0  link for the stub's loader
"""

import contextlib
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.errors import ERROR_MARK
from ensemble.serving.cancels import CANCEL_ADDRESS_VARIABLE
from tools.installation.server_files import Installation, ServerError, find_libpython
from tools.server.processes import end_session, spawn

MODEL_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
MARK = "distserve: "  # of lines in the server's log that are for the operator
SHM = Path("/dev/shm")
TMP = Path("/tmp")  # whatever TMPDIR says, the Python backend makes an empty folder here
CLOCK_TICK_S = 0.05  # by which a file's time may lag behind
STOP_S = 3.5  # from SIGTERM until what is left is killed

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @classmethod
    def free(cls) -> "Ports":
        return cls(*free_ports(3))


def free_ports(count: int, besides: Collection[int] = ()) -> list[int]:
    """Ports that nothing listens on, below the range from which outgoing connections take theirs."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        if port not in besides and port_is_free("0.0.0.0", port):
            ports.add(port)
    return list(ports)


def port_is_free(host: str, port: int) -> bool:
    """Raises ServerError for a host that is no address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError as error:
        raise ServerError(f"host {host}: {error.strerror}") from None
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            return False
    return True


class TritonServer:
    """One server process with its stubs and workers, as a context manager that starts it.

    `start` returns at once; `wait_ready` returns when every model is ready and every front open. `stop` leaves no
    process, no run directory and no shared memory. Ports are free ones unless given.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        log_path: Path | None = None,  # None: in the run directory, so gone after `stop`
        model_repository: Path = MODEL_REPOSITORY,
        http_relay: bool = True,  # which cancels requests whose HTTP client goes away; False: the Triton server's port
    ) -> None:
        self.deployment = deployment
        self.ports = ports
        self.host = host
        self.model_repository = model_repository
        self._log_path = log_path
        self._has_relay = http_relay
        self._own_http = (host, 0)  # where the Triton server itself listens
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: subprocess.Popen[bytes] | None = None
        self._run_dir: Path | None = None
        self._starting_s = (0.0, math.inf)  # from when to when the server was starting, as time.time()

    def __enter__(self) -> "TritonServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        return f"http://{self._client_host}:{self._ports.http}"

    @property
    def direct_http_url(self) -> str:
        """The Triton server's own, without the relay before it."""
        return f"http://{'127.0.0.1' if self._has_relay else self._client_host}:{self._own_http[1]}"

    @property
    def relay_pid(self) -> int:
        assert self._relay is not None, "the server has no HTTP relay"
        return self._relay.pid

    @property
    def grpc_url(self) -> str:
        """As tritonclient.grpc takes it, without a scheme."""
        return f"{self._client_host}:{self._ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._client_host}:{self._ports.metrics}/metrics"

    @property
    def log_path(self) -> Path:
        return self._log_path or self.run_dir / "server.log"

    @property
    def run_dir(self) -> Path:
        assert self._run_dir is not None, "the server has not been started"
        return self._run_dir

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    @property
    def _ports(self) -> Ports:
        assert self.ports is not None, "the server has not been started"
        return self.ports

    @property
    def _client_host(self) -> str:
        """As part of a URL."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def _shm_prefix(self) -> str:
        return f"triton_python_backend_shm_region_{self.run_dir.name}_"

    def start(self) -> None:
        """Starts the server program. Raises ServerError."""
        installation = Installation.find()
        if self.ports is None:
            self.ports = Ports.free()
        for port in (self.ports.http, self.ports.grpc, self.ports.metrics):
            if not port_is_free(self.host, port):
                raise ServerError(f"port {port} is in use")
        self._own_http = (self.host, self.ports.http)
        if self._has_relay:
            self._own_http = ("127.0.0.1", free_ports(1, besides={*astuple(self.ports)})[0])
        self._run_dir = make_run_dir()
        self._starting_s = (time.time(), math.inf)
        try:
            self._fill_run_dir(installation)
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("wb") as log:
                self._process = spawn(self._command(installation), log, self._environment())
                if self._has_relay:
                    self._relay = spawn(self._relay_command(), log, self._environment())
        except OSError as error:
            self.stop()
            raise ServerError(f"the Triton server cannot be started: {error}") from None

    def wait_ready(self, progress: Progress = lambda line: None, timeout_s: float = 3600.0) -> None:
        """Returns when all models are ready and all fronts open; `progress` gets the operator's lines of the log.

        Raises ServerError.
        """
        assert self._process is not None, "the server has not been started"
        deadline = time.monotonic() + timeout_s
        num_seen = 0
        is_ready = False
        while not is_ready:
            is_ready = self._is_ready()
            lines = self._operator_lines()
            for line in lines[num_seen:]:
                progress(line)
            num_seen = len(lines)
            if self._ended() is not None:
                raise ServerError(self.failure_reason())
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {timeout_s:.0f} s")
            if not is_ready:
                time.sleep(0.05)
        self._starting_s = (self._starting_s[0], time.time())

    def wait(self) -> int:
        """Blocks until the server program ends, or the relay before it, and returns its exit status."""
        while (ended := self._ended()) is None:
            time.sleep(0.1)
        return int(ended.returncode)

    def _ended(self) -> "subprocess.Popen[bytes] | None":
        """The process that has ended first, if any."""
        assert self._process is not None, "the server has not been started"
        running = [process for process in (self._process, self._relay) if process is not None]
        return next((process for process in running if process.poll() is not None), None)

    def failure_reason(self) -> str:
        """Why the server ended, in one line out of its log."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith(ERROR_MARK):
                return line.removeprefix(ERROR_MARK).strip()
        ended = self._ended()
        status = ended.returncode if ended else None
        if ended is not None and ended is self._relay:
            return f"the HTTP relay ended with status {status}"
        errors = [line for line in lines if line.startswith("E") and "] " in line]
        return errors[-1].split("] ", 1)[1].strip('" ') if errors else f"the Triton server ended with status {status}"

    def stop(self) -> None:
        """Ends the server, its stubs and workers, and removes what they leave behind. Safe to repeat."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S - 0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            end_session(self._process.pid, grace_s=0.5)
            if self._process.returncode != 0:
                self._remove_environment_folder()
            self._process = None
        if self._relay is not None:  # after the server, whose last answers it passes
            self._relay.kill()
            self._relay.wait()
            self._relay = None
        if self._run_dir is not None:
            for region in SHM.glob(f"{self._shm_prefix}*"):
                region.unlink(missing_ok=True)
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None

    def _remove_environment_folder(self) -> None:
        """Removes what a server that was cut short leaves in /tmp, told by its age: its name says not whose it is."""
        earliest_s, latest_s = self._starting_s
        for folder in TMP.glob("python_env_??????"):
            with contextlib.suppress(OSError):  # gone, or not empty
                status = folder.stat()
                if status.st_uid == os.geteuid() and earliest_s - CLOCK_TICK_S <= status.st_mtime <= latest_s:
                    folder.rmdir()

    def _is_ready(self) -> bool:
        """Of the three fronts the server opens that of the metrics last, some 40 ms after it says that it is ready."""
        try:
            for url in (f"{self.http_url}/v2/health/ready", self.metrics_url):
                with urllib.request.urlopen(url, timeout=5) as response:
                    if response.status != 200:
                        return False
            return True
        except OSError:  # URLError is one
            return False

    def _operator_lines(self) -> list[str]:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.removeprefix(MARK) for line in lines if line.startswith(MARK) and not line.startswith(ERROR_MARK)]

    def _fill_run_dir(self, installation: Installation) -> None:
        backend = self.run_dir / "backends/python"
        backend.mkdir(parents=True)
        for file in installation.backend_files:
            (backend / file.name).symlink_to(file)
        (self.run_dir / "lib").mkdir()
        libpython = find_libpython()
        if libpython is not None:
            (self.run_dir / "lib" / libpython.name).symlink_to(libpython)
        (self.run_dir / "models").symlink_to(self.model_repository.resolve())
        (self.run_dir / "deployment.yaml").write_text(self.deployment.to_yaml(), encoding="utf-8")

    def _command(self, installation: Installation) -> list[str]:
        num_replicas = self.deployment.prefill.num_replicas + self.deployment.decode.num_replicas
        python_backend = {
            "shm-default-byte-size": shm_region_bytes(),
            "shm-growth-byte-size": shm_region_bytes(),
            "shm-region-prefix-name": self._shm_prefix,
            "thread-pool-size": 64 + 8 * num_replicas,  # each parked call of the scheduler holds one
            "stub-timeout-seconds": 3600,  # a model is initialised when its workers have loaded their weights
        }
        options: dict[str, object] = {
            "model-repository": self.run_dir / "models",
            "backend-directory": self.run_dir / "backends",
            "http-address": http_address(self._own_http[0]),
            "http-port": self._own_http[1],
            "grpc-address": f"[{self.host}]" if ":" in self.host else self.host,
            "grpc-port": self._ports.grpc,
            "metrics-address": http_address(self.host),
            "metrics-port": self._ports.metrics,
            "exit-timeout-secs": 2,
        }
        return [
            str(installation.server),
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--backend-config=python,{name}={value}" for name, value in python_backend.items()),
        ]

    def _relay_command(self) -> list[str]:
        arguments = [self.host, str(self._ports.http), str(self._own_http[1]), self._cancel_address]
        return [sys.executable, "-m", "ensemble.serving.http_relay", *arguments]

    @property
    def _cancel_address(self) -> str:
        return f"ipc://{self.run_dir}/cancels"

    def _environment(self) -> dict[str, str]:
        """The stub finds its packages through the first `python3` on PATH, and ignores PYTHONPATH."""
        return {
            **os.environ,
            "PATH": prepend(Path(sys.prefix) / "bin", os.environ.get("PATH")),
            "LD_LIBRARY_PATH": prepend(self.run_dir / "lib", os.environ.get("LD_LIBRARY_PATH")),
            "PYTHONNOUSERSITE": "1",
            "TMPDIR": str(self.run_dir),
            DEPLOYMENT_VARIABLE: str(self.run_dir / "deployment.yaml"),
            CANCEL_ADDRESS_VARIABLE: self._cancel_address,
        }


def shm_region_bytes() -> int:
    """Of each stub: a container has 64 MiB of shared memory, unless it is told otherwise."""
    return max(1 << 20, min(16 << 20, shutil.disk_usage(SHM).free // 32))


def http_address(host: str) -> str:
    """As the Triton server's HTTP library takes it."""
    return f"ipv6:{host}" if ":" in host else host


def make_run_dir() -> Path:
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="distserve-", dir=folder if len(folder) <= 40 else "/tmp"))


def prepend(folder: Path, paths: str | None) -> str:
    return f"{folder}:{paths}" if paths else str(folder)
