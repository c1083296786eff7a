"""Starts, watches and stops the real Triton server: used by `tools.serve`, `tools.demo` and the tests alike.

What a server leaves on disk lies in one private run directory, which `stop` removes:

    /tmp/distserve-XXXXXXXX/     mode 0700; the server's TMPDIR, short because sockets' paths are limited to 107 bytes
        deployment.yaml          what the models read
        models/                  links into the model repository, whose own path may hold spaces: stubs cannot have them
        backends/python/         links to the Python backend and to the stub for this interpreter's version
        lib/libpython3.X.so.1.0  link for the stub's loader
        owner, starting, ready   run_dir.py's
        secret, stubs, ...       what the processes share (ensemble/serving/run_dir.py)
"""

import contextlib
import os
import re
import resource
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.errors import ERROR_MARK
from ensemble.listener import raise_file_limit
from ensemble.models.spec import load_model_spec
from ensemble.openai_front import API_KEY_VARIABLE
from ensemble.replicas.launchers.base import GIVE_BACK_MEMORY
from ensemble.serving import control
from ensemble.serving.heartbeat import read_heartbeats
from ensemble.serving.metrics_page import METRICS_VARIABLE
from ensemble.serving.run_dir import RUN_DIR_VARIABLE
from tools.installation.server_files import Installation, ServerError, find_libpython
from tools.server.local_ray import LocalRay
from tools.server.ports import Ports, free_ports, port_is_free
from tools.server.processes import end_processes, how_it_ended, spawn
from tools.server.run_dir import GRACE_S, RunDir, remove_environment_folder, shm_prefix
from tools.server.watch import StubWatch

MODEL_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
MARK = "distserve: "  # of lines in the server's log that are for the operator
MAX_BODY_BYTES = 4 << 20  # of an HTTP request
LOADED_TO_READY_S = 60.0  # a server that is not ready so long after its models have loaded will never be
MAX_STALLED_STARTS = 2
RELAY, OPENAI_FRONT = "HTTP relay", "OpenAI front"  # the processes beside the Triton server
CONTROL_S = 2.0  # for the scheduler to answer a command
MANY_CORES = 4
STACKS_S = 0.5  # for the stubs to write their stacks, if they can
LAST_WORDS_S = 1.0  # for the last errors to be handed over
# What a stub's shared memory may grow to for what comes in, and never shrinks from: room for many requests, and for
# each token of the longest one more than any text or message of so many tokens has. The server refuses what is larger.
SHM_BYTES, SHM_BYTES_PER_TOKEN = 32 << 20, 2 << 10
# What is in the log of every start on a machine without GPU, and no reason of anything.
NO_REASON = re.compile("CUDA|NVML|DCGM", re.IGNORECASE)
LAST_CRY = re.compile("ASSERTION FAILED|terminate called|what\\(\\):")

Progress = Callable[[str], None]


class StalledStart(ServerError):
    """All models have loaded, and the server does not become ready."""


class TritonServer:
    """One server process with its stubs and workers, as a context manager that starts it.

    `start` returns at once; `wait_ready` returns when every model is ready and every front open. `wait` returns when it
    can serve no more, and then `restart` starts it again at the same ports. `stop` leaves no process, no run directory
    and no shared memory. Ports are free ones unless given.
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
        openai_port: int | None = None,  # of a front for OpenAI's clients; None: there is none
        page: bool = True,  # for browsers, at that port
        api_key: str | None = None,  # that the front's clients have to have
        allowed_origins: Sequence[str] = (),  # of browsers' pages that may call the front
        max_body_bytes: int = MAX_BODY_BYTES,
        allow_client_shm: bool = False,  # clients may register shared memory
        num_postprocess: int | None = None,  # instances of that model; None: two, or one where there are few cores
    ) -> None:
        self.deployment = deployment
        self.ports = ports
        self.host = host
        self.model_repository = model_repository
        self._log_path = log_path
        self._has_relay = http_relay
        self._openai_port = openai_port
        self._has_page = page
        self._api_key = api_key
        self._allowed_origins = allowed_origins
        self._max_body_bytes = max_body_bytes
        self._allow_client_shm = allow_client_shm
        # On two cores one, whose responses carry more tokens: docs/results/README.md.
        self._num_postprocess = num_postprocess or (2 if len(os.sched_getaffinity(0)) >= MANY_CORES else 1)
        self._local_ray: LocalRay | None = None  # a cluster of our own
        self._ray: subprocess.Popen[bytes] | None = None
        self._own_http = (host, 0)  # where the Triton server itself listens
        self._own_metrics = (host, 0)  # where it has its own metrics, which the scheduler puts before ours
        self._process: subprocess.Popen[bytes] | None = None
        self._beside: dict[str, subprocess.Popen[bytes]] = {}  # RELAY, OPENAI_FRONT |-> its process, if it has one
        self._run_dir: RunDir | None = None
        self._watch: StubWatch | None = None
        self._log_start = 0  # bytes of the log that are of earlier lives
        self._was_ready = False  # in this life

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
        host, port = self._own_http
        return f"http://{self._client_host if host == self.host else host}:{port}"

    @property
    def relay_pid(self) -> int:
        return self._beside[RELAY].pid

    @property
    def openai_pid(self) -> int:
        return self._beside[OPENAI_FRONT].pid

    @property
    def beside_pids(self) -> list[int]:
        """Of the relay and the OpenAI front."""
        return [process.pid for process in self._beside.values()]

    @property
    def openai_url(self) -> str:
        """As OpenAI's clients take it for their base URL."""
        return f"http://{self._client_host}:{self._openai_port}/v1"

    @property
    def page_url(self) -> str:
        return self.openai_url.removesuffix("v1")

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
        return self._run_dir.path

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

    def start(self) -> None:
        """Starts the server program. Raises ServerError."""
        installation = Installation.find()
        raise_file_limit()  # the server's, the stubs' and the workers' too
        self._run_dir = RunDir()  # first: it ends what is left of a server that was killed, and may hold these ports
        try:
            self._choose_ports()
            if self.deployment.launcher == "ray" and not os.environ.get("RAY_ADDRESS"):
                self._local_ray = LocalRay()
            self._fill_run_dir(installation)
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.write_bytes(b"")
            self._start_server()
            self._start_beside()
        except ServerError:
            self.stop()
            raise
        except OSError as error:
            self.stop()
            raise ServerError(f"the Triton server cannot be started: {error}") from None

    def _choose_ports(self) -> None:
        """Raises ServerError."""
        if self.ports is None:
            self.ports = Ports.free()
        for port in (*astuple(self.ports), *([] if self._openai_port is None else [self._openai_port])):
            if not port_is_free(self.host, port):
                raise ServerError(f"port {port} is in use")
        own_http, own_metrics = free_ports(2, besides={*astuple(self.ports)})
        self._own_http = ("127.0.0.1", own_http) if self._has_relay else (self.host, self.ports.http)
        self._own_metrics = ("127.0.0.1", own_metrics) if self._has_scheduler else (self.host, self.ports.metrics)

    def _start_server(self) -> None:
        assert self._run_dir is not None
        self._log_start = self.log_path.stat().st_size
        self._was_ready = False
        self._run_dir.server_starts()
        if self._local_ray is not None:
            self._ray = self._spawn(self._local_ray.command(self.run_dir, self.deployment))
        self._process = self._spawn(self._command(Installation.find()), GIVE_BACK_MEMORY)
        self._watch = StubWatch(self.run_dir)

    def _start_beside(self) -> None:
        """Those that are to run, and do not."""
        commands = {RELAY: self._relay_command} if self._has_relay else {}
        if self._openai_port is not None:
            commands[OPENAI_FRONT] = self._openai_command
        for name, command in commands.items():
            if name not in self._beside or self._beside[name].poll() is not None:
                self._beside[name] = self._spawn(command())

    def _spawn(self, command: list[str], defaults: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return spawn(command, log, {**(defaults or {}), **self._environment()})

    def wait_ready(self, progress: Progress = lambda line: None, timeout_s: float = 3600.0) -> None:
        """Returns when all models are ready and all fronts open; `progress` gets the operator's lines of the log.

        A start that stalls after loading is made again. Raises ServerError.
        """
        deadline = time.monotonic() + timeout_s
        for attempt in range(MAX_STALLED_STARTS + 1):
            try:
                self._wait_ready(progress, timeout_s, deadline)
                return
            except StalledStart as stalled:
                if attempt == MAX_STALLED_STARTS:
                    raise
                progress(f"{stalled}; starting it again")
                self._restart_server()

    def _wait_ready(self, progress: Progress, timeout_s: float, deadline: float) -> None:
        num_seen = 0
        loaded_at: float | None = None
        while True:
            self._was_ready = self._is_ready()
            lines = self._operator_lines()
            for line in lines[num_seen:]:
                progress(line)
            num_seen = len(lines)
            if (reason := self.poll()) is not None:
                raise ServerError(reason)
            if self._was_ready:
                break
            if loaded_at is None and self._has_loaded():
                loaded_at = time.monotonic()
            if loaded_at is not None and time.monotonic() > loaded_at + LOADED_TO_READY_S:
                self._print_stacks()
                raise StalledStart(
                    f"the server was not ready {LOADED_TO_READY_S:.0f} s after all its models had loaded"
                )
            if time.monotonic() > deadline:
                self._print_stacks()
                raise ServerError(f"the server was not ready after {timeout_s:.0f} s")
            time.sleep(0.05)
        assert self._run_dir is not None
        self._limit_shared_memory()
        self._run_dir.server_is_ready()

    def _limit_shared_memory(self) -> None:
        """The server has no such limit, but cannot make a file longer than its own, which its stubs do not inherit now.

        Python, which execs it, ignores SIGXFSZ, and so it does. Its log is a file, too, but grows by the stubs' lines.
        """
        assert self._process is not None
        if not self._has_scheduler:
            return
        limit = SHM_BYTES + SHM_BYTES_PER_TOKEN * self._max_model_len
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        with contextlib.suppress(ProcessLookupError):  # `wait` will tell
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def wait(self) -> str:
        """Blocks until the server or its relay has ended, or can serve no more, and returns why in one line."""
        while (reason := self.poll()) is None:
            time.sleep(0.1)
        return reason

    def poll(self) -> str | None:
        """Why it can serve no more; None: it goes on. To be called every 0.1 s."""
        if self._server_ended:
            return self._why_it_ended()
        if self._ray is not None and (status := self._ray.poll()) is not None:
            return f"the Ray cluster ended: {how_it_ended(status)}"
        for name, process in self._beside.items():
            if (status := process.poll()) is not None:
                return self._error_line() or f"the {name} ended: {how_it_ended(status)}"
        assert self._watch is not None
        if not self._was_ready:
            return None  # why a start failed the server itself tells
        return self._watch.poll()

    def restart(self) -> None:
        """After `wait`: starts again what has ended, a process beside it or the Triton server with stubs and workers.

        `wait_ready` tells when it serves.
        """
        self._start_beside()
        if self.poll() is not None:
            self._restart_server()

    def drain(self, timeout_s: float) -> None:
        """Has new requests refused, and returns when the running ones have ended: after `timeout_s` by an error."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(control.ControlError):  # nothing runs there any more
            load = control.call(self.run_dir, control.Drain(), control.Load, CONTROL_S)
            while load.num_open and time.monotonic() < deadline and self.poll() is None:
                time.sleep(0.05)
                load = control.call(self.run_dir, control.Status(), control.Load, CONTROL_S)
            deadline = time.monotonic() + LAST_WORDS_S
            if load.num_open:
                load = control.call(self.run_dir, control.EndAll(), control.Load, CONTROL_S)
            while load.num_open and time.monotonic() < deadline and self.poll() is None:
                time.sleep(0.05)
                load = control.call(self.run_dir, control.Status(), control.Load, CONTROL_S)

    def stop(self) -> None:
        """Ends the server, its stubs and workers, and removes what they leave behind. Safe to repeat."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(GRACE_S - 0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.returncode != 0:
                remove_environment_folder(self.run_dir)
            self._process = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for process in self._beside.values():  # after the server, whose last answers they pass
            process.kill()
            process.wait()
        self._beside = {}
        if self._run_dir is not None:
            self._end_ray()
            self._run_dir.remove(grace_s=0.5)
            self._run_dir = None

    def _restart_server(self) -> None:
        """Ends what is left of it at once: its clients learn of that, and could get nothing from it any more."""
        assert self._run_dir is not None
        assert self._process is not None
        assert self._watch is not None
        self._process.kill()
        self._process.wait()
        self._watch.close()
        self._end_ray()
        end_processes(self.run_dir, 0.0, besides=self.beside_pids)
        self._run_dir.remove_leftovers_of_server()
        self._start_server()

    def _end_ray(self) -> None:
        """Of a cluster of our own the first process; the others are ended with whatever is left of the run."""
        if self._ray is not None:
            self._ray.kill()
            self._ray.wait()
            self._ray = None

    @property
    def _server_ended(self) -> bool:
        assert self._process is not None, "the server has not been started"
        return self._process.poll() is not None

    def _why_it_ended(self) -> str:
        assert self._process is not None
        how = f"the Triton server ended: {how_it_ended(self._process.returncode)}"
        if (line := self._error_line()) is not None:
            return line
        lines = self._log_lines()
        if self._was_ready:
            cries = [line.strip() for line in lines if LAST_CRY.search(line)]
            return f"{how}: {cries[-1]}" if cries else how
        errors = [line for line in lines if line.startswith("E") and "] " in line and not NO_REASON.search(line)]
        return errors[-1].split("] ", 1)[1].strip('" ') if errors else how

    def _error_line(self) -> str | None:
        """What a process of ours gave as the reason of its end."""
        lines = [line.removeprefix(ERROR_MARK).strip() for line in self._log_lines() if line.startswith(ERROR_MARK)]
        return (lines[-1] if self._was_ready else lines[0]) if lines else None  # a start fails by its first

    def _log_lines(self) -> list[str]:
        """Of this life of the server."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", errors="replace").splitlines()

    def _print_stacks(self) -> None:
        assert self._watch is not None
        self._watch.print_stacks()
        time.sleep(STACKS_S)

    def _has_loaded(self) -> bool:
        """Whether every model that has a stub is done with its `initialize`."""
        models = {path.parent.parent.name for path in self.model_repository.glob("*/1/model.py")}
        beats = {beat.model: beat for beat in read_heartbeats(self.run_dir).values()}
        # The scheduler says so only when it could serve a request.
        return models == {name for name, beat in beats.items() if beat.is_serving or name == "scheduler"}

    def _is_ready(self) -> bool:
        """Of the fronts the server opens that of the metrics last, some 40 ms after it says that it is ready."""
        try:
            urls = [f"{self.direct_http_url}/v2/health/ready", self.metrics_url, f"{self.http_url}/v2/health/live"]
            for url in urls if self._openai_port is None else [*urls, f"{self.page_url}health"]:
                with urllib.request.urlopen(url, timeout=5) as response:
                    if response.status != 200:
                        return False
        except OSError:  # URLError is one
            return False
        return all(beat.is_serving for beat in read_heartbeats(self.run_dir).values())

    def _operator_lines(self) -> list[str]:
        lines = self._log_lines()
        return [line.removeprefix(MARK) for line in lines if line.startswith(MARK) and not line.startswith(ERROR_MARK)]

    def _fill_run_dir(self, installation: Installation) -> None:
        backend = self.run_dir / "backends/python"
        backend.mkdir(parents=True)
        for file in installation.backend_files:
            (backend / file.name).symlink_to(file)
        (self.run_dir / "http-port").write_text(str(self._ports.http), encoding="utf-8")
        (self.run_dir / "lib").mkdir()
        libpython = find_libpython()
        if libpython is not None:
            (self.run_dir / "lib" / libpython.name).symlink_to(libpython)
        self._link_models(self.run_dir / "models")
        (self.run_dir / "deployment.yaml").write_text(self.deployment.to_yaml(), encoding="utf-8")

    def _link_models(self, folder: Path) -> None:
        """With as many instances of `postprocess` as are asked for: its config.pbtxt cannot say by the cores."""
        folder.mkdir()
        for model in self.model_repository.resolve().iterdir():
            if model.name != "postprocess":
                (folder / model.name).symlink_to(model)
                continue
            (folder / model.name).mkdir()
            for part in model.iterdir():
                if part.name != "config.pbtxt":
                    (folder / model.name / part.name).symlink_to(part)
            config = (model / "config.pbtxt").read_text(encoding="utf-8")
            config = re.sub(r"count: \d+", f"count: {self._num_postprocess}", config)
            (folder / model.name / "config.pbtxt").write_text(config, encoding="utf-8")

    def _command(self, installation: Installation) -> list[str]:
        num_replicas = self.deployment.prefill.num_replicas + self.deployment.decode.num_replicas
        python_backend = {
            "shm-default-byte-size": 4 << 20,  # six stubs, and room to grow, in the 64 MiB that containers get
            "shm-growth-byte-size": 4 << 20,
            "shm-region-prefix-name": shm_prefix(self.run_dir),
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
            "grpc-infer-allocation-pool-size": 0,  # what is kept for reuse stays as large as the largest request
            "metrics-address": http_address(self._own_metrics[0]),
            "metrics-port": self._own_metrics[1],
            "exit-timeout-secs": 2,
            "http-restricted-api": f"{self._closed_protocols}:{secrets.token_hex(8)}={secrets.token_hex(16)}",
            "grpc-restricted-protocol": f"{self._closed_protocols}:{secrets.token_hex(8)}={secrets.token_hex(16)}",
        }
        return [
            str(installation.server),
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--backend-config=python,{name}={value}" for name, value in python_backend.items()),
        ]

    def _relay_command(self) -> list[str]:
        arguments = [self.host, self._ports.http, self._own_http[1], self.run_dir, self._max_body_bytes]
        arguments += ["allow-client-shm"] if self._allow_client_shm else []
        return [sys.executable, "-m", "ensemble.serving.http_relay", *map(str, arguments)]

    def _openai_command(self) -> list[str]:
        model = self.deployment.model
        arguments = {
            "model": model.path,
            "name": model.name,
            "max-model-len": self._max_model_len,
            "grpc-url": self.grpc_url,
            "ready-url": f"{self.http_url}/v2/health/ready",
            "max-body-bytes": self._max_body_bytes,
            "host": self.host,
            "port": self._openai_port,
        }
        if self._has_page:
            arguments |= {"metrics-url": self.metrics_url, "run-dir": self.run_dir}
        options = [f"--{name}={value}" for name, value in arguments.items()]
        options += [f"--allowed-origin={origin}" for origin in self._allowed_origins]
        return [sys.executable, "-m", "ensemble.openai_front", *options]

    @property
    def _has_scheduler(self) -> bool:
        """Whether the models are ours: that one serves the metrics port."""
        return (self.model_repository / "scheduler").is_dir()

    @property
    def _max_model_len(self) -> int:
        model = self.deployment.model
        return model.limit_model_len(load_model_spec(model.path).max_model_len)

    @property
    def _closed_protocols(self) -> str:
        """To all: nobody is told the header that would open them."""
        return ",".join(["model-repository", "trace", "logging"] + ["shared-memory"] * (not self._allow_client_shm))

    def _environment(self) -> dict[str, str]:
        """The stub finds its packages through the first `python3` on PATH, and ignores PYTHONPATH."""
        return {
            **os.environ,
            "PATH": prepend(Path(sys.prefix) / "bin", os.environ.get("PATH")),
            "LD_LIBRARY_PATH": prepend(self.run_dir / "lib", os.environ.get("LD_LIBRARY_PATH")),
            "PYTHONNOUSERSITE": "1",
            "TMPDIR": str(self.run_dir),
            DEPLOYMENT_VARIABLE: str(self.run_dir / "deployment.yaml"),
            RUN_DIR_VARIABLE: str(self.run_dir),
            METRICS_VARIABLE: f"{self.host} {self._ports.metrics} {self._own_metrics[1]}",
            **({} if self._api_key is None else {API_KEY_VARIABLE: self._api_key}),
            **(self._local_ray.environment if self._local_ray is not None else {}),
        }


def prepend(folder: Path, paths: str | None) -> str:
    return f"{folder}:{paths}" if paths else str(folder)


def http_address(host: str) -> str:
    """As the Triton server's HTTP library takes it."""
    return f"ipv6:{host}" if ":" in host else host
