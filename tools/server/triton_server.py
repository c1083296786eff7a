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

import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from ensemble.config import Deployment
from ensemble.listener import raise_file_limit
from ensemble.models.spec import load_model_spec
from ensemble.openai_front import API_KEY_VARIABLE
from ensemble.replicas.launchers.base import GIVE_BACK_MEMORY
from ensemble.serving.heartbeat import read_heartbeats
from ensemble.serving.metrics_page import METRICS_VARIABLE
from tools.installation.server_files import Installation, ServerError
from tools.server.answers import OPENAI_FRONT, RELAY, TRITON_SERVER, AnswerWatch
from tools.server.commands import environment, fill_run_dir, openai_command, relay_command, triton_command
from tools.server.drain import drain
from tools.server.local_ray import LocalRay
from tools.server.ports import Ports, free_ports, port_is_free
from tools.server.processes import end_processes, has_children, how_it_ended, limit_file_size, spawn
from tools.server.run_dir import GRACE_S, RunDir, remove_environment_folder
from tools.server.server_log import ServerLog
from tools.server.stall_guard import preload
from tools.server.watch import StubWatch

MODEL_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
MAX_BODY_BYTES = 4 << 20  # of an HTTP request
LOADED_TO_READY_S = 60.0  # a server that is not ready so long after its models have loaded will never be
MAX_STALLED_STARTS = 2
PASS_ON_S = 0.3  # for the server, what its last stub has said
STACKS_S = 0.5  # for the stubs to write their stacks, if they can
# What a stub's shared memory may grow to for what comes in, and never shrinks from: room for many requests, and for
# each token of the longest one more than any text or message of so many tokens has. The server refuses what is larger.
SHM_BYTES, SHM_BYTES_PER_TOKEN = 32 << 20, 2 << 10

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
        self._local_ray: LocalRay | None = None  # a cluster of our own
        self._ray: subprocess.Popen[bytes] | None = None
        self._own_http = (host, 0)  # where the Triton server itself listens
        self._own_metrics = (host, 0)  # where it has its own metrics, which the scheduler puts before ours
        self._process: subprocess.Popen[bytes] | None = None
        self._beside: dict[str, subprocess.Popen[bytes]] = {}  # RELAY, OPENAI_FRONT |-> its process, if it has one
        self._run_dir: RunDir | None = None
        self._watch: StubWatch | None = None
        self._answers = AnswerWatch()
        self._log: ServerLog | None = None
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
            fill_run_dir(
                self.run_dir,
                installation,
                self.model_repository,
                self.deployment,
                self._ports.http,
            )
            self._log = ServerLog(self.log_path)
            self._start_server(installation)
            self._start_beside()
        except ServerError:
            self.stop()
            raise
        except OSError as error:
            self.stop()
            raise ServerError(f"the Triton server cannot be started: {error}") from None

    def _choose_ports(self) -> None:
        """Raises ServerError."""
        ports = set() if self._openai_port is None else {self._openai_port}
        if self.ports is None:
            self.ports = Ports.free(besides=ports)
        ports |= {*astuple(self.ports)}
        for port in ports:
            if not port_is_free(self.host, port):
                raise ServerError(f"port {port} is in use")
        own_http, own_metrics = free_ports(2, besides=ports)
        self._own_http = ("127.0.0.1", own_http) if self._has_relay else (self.host, self.ports.http)
        self._own_metrics = ("127.0.0.1", own_metrics) if self._has_scheduler else (self.host, self.ports.metrics)

    def _start_server(self, installation: Installation) -> None:
        assert self._run_dir is not None and self._log is not None
        self._log.begin_life()
        self._was_ready = False
        self._run_dir.server_starts()
        if self._local_ray is not None:
            self._ray = self._spawn(self._local_ray.command(self.run_dir, self.deployment))
        self._process = self._spawn(
            triton_command(
                installation,
                self.run_dir,
                http=self._own_http,
                grpc=(self.host, self._ports.grpc),
                metrics=self._own_metrics,
                num_replicas=self.deployment.prefill.num_replicas + self.deployment.decode.num_replicas,
                allow_client_shm=self._allow_client_shm,
            ),
            GIVE_BACK_MEMORY,
            preload(os.environ, self.run_dir),
        )
        self._watch = StubWatch(self.run_dir)
        live_url = f"{self.direct_http_url}/v2/health/live"
        self._answers.watch(TRITON_SERVER, self._process.pid, live_url, time.monotonic())

    def _start_beside(self) -> None:
        """Those that are to run, and do not."""
        if self._has_relay and not self._runs(RELAY):
            command = relay_command(
                self.host,
                self._ports.http,
                self._own_http[1],
                self.run_dir,
                max_body_bytes=self._max_body_bytes,
                allow_client_shm=self._allow_client_shm,
            )
            self._start_one_beside(RELAY, command, f"{self.http_url}/v2/health/live")
        if self._openai_port is not None and not self._runs(OPENAI_FRONT):
            command = openai_command(
                self.deployment.model,
                self._max_model_len,
                self.host,
                self._openai_port,
                grpc_url=self.grpc_url,
                http_url=self.http_url,
                max_body_bytes=self._max_body_bytes,
                allowed_origins=self._allowed_origins,
                shown=(self.metrics_url, self.run_dir) if self._has_page else None,
            )
            self._start_one_beside(OPENAI_FRONT, command, f"{self.openai_url}/models")

    def _start_one_beside(self, name: str, command: list[str], url: str) -> None:
        self._end_beside(name)
        self._beside[name] = self._spawn(command)
        self._answers.watch(name, self._beside[name].pid, url, time.monotonic())

    def _end_beside(self, *names: str) -> None:
        for name in names:
            if (process := self._beside.pop(name, None)) is not None:
                process.kill()
                process.wait()

    def _runs(self, name: str) -> bool:
        return name in self._beside and self._beside[name].poll() is None and not self._answers.has_hung(name)

    def _spawn(
        self,
        command: list[str],
        defaults: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        variables = {**(defaults or {}), **environment(self.run_dir), **(settings or {})}
        variables[METRICS_VARIABLE] = f"{self.host} {self._ports.metrics} {self._own_metrics[1]}"
        if self._api_key is not None:
            variables[API_KEY_VARIABLE] = self._api_key
        if self._local_ray is not None:
            variables |= self._local_ray.environment
        with self.log_path.open("ab") as log:
            return spawn(command, log, variables)

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
                self._end_beside(*self._beside)  # one that has hung is not ready either
                self._restart_server()
                self._start_beside()

    def _wait_ready(self, progress: Progress, timeout_s: float, deadline: float) -> None:
        assert self._run_dir is not None and self._log is not None
        num_seen = 0
        loaded_at: float | None = None
        while True:
            self._was_ready = not self._answers.waits and self._is_ready()
            lines = self._log.operator_lines()
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
        self._answers.all_have_answered()  # so they have, though some not to the watch yet
        self._limit_shared_memory(progress)
        self._run_dir.server_is_ready()

    def _limit_shared_memory(self, progress: Progress) -> None:
        """The server has no such limit, but cannot make a file longer than its own, which its stubs do not inherit now.

        Python, which execs it, ignores SIGXFSZ, and so it does. Its log is a file, too, but grows by the stubs' lines.
        """
        assert self._process is not None
        if not self._has_scheduler:
            return
        try:
            limit_file_size(self._process.pid, SHM_BYTES + SHM_BYTES_PER_TOKEN * self._max_model_len)
        except OSError as error:  # it serves without; if it has ended, `wait` will tell
            progress(f"the Triton server's shared memory has no limit: RLIMIT_FSIZE: {error}")

    def wait(self) -> str:
        """Blocks until the server or its relay has ended, or can serve no more, and returns why in one line."""
        while (reason := self.poll()) is None:
            time.sleep(0.1)
        return reason

    def poll(self) -> str | None:
        """Why it can serve no more; None: it goes on. To be called every 0.1 s."""
        assert self._process is not None and self._log is not None and self._watch is not None
        if (status := self._process.poll()) is not None:
            how = f"the Triton server ended: {how_it_ended(status)}"
            return self._log.why_it_ended(how, was_ready=self._was_ready)
        if self._ray is not None and (status := self._ray.poll()) is not None:
            return f"the Ray cluster ended: {how_it_ended(status)}"
        for name, process in self._beside.items():
            if (status := process.poll()) is not None:
                return self._log.error(was_ready=self._was_ready) or f"the {name} ended: {how_it_ended(status)}"
        if (reason := self._answers.poll(time.monotonic())) is not None:
            return reason
        if not self._was_ready:
            return None  # why a start failed the server itself tells
        return self._watch.poll()

    def restart(self) -> None:
        """After `wait`: starts again what has ended or hung, one beside it or the Triton server with stubs and workers.

        `wait_ready` tells when it serves.
        """
        self._start_beside()
        if self.poll() is not None:
            self._restart_server()

    def drain(self, timeout_s: float) -> None:
        """Has new requests refused, and returns when the running ones have ended: after `timeout_s` by an error."""
        drain(self.run_dir, timeout_s, lambda: self.poll() is None)

    def stop(self) -> None:
        """Ends the server, its stubs and workers, and removes what they leave behind. Safe to repeat."""
        self._answers.close()  # the server would wait for its connections to end
        if self._process is not None:
            self._process.terminate()
            deadline = time.monotonic() + GRACE_S - 0.5
            while self._process.poll() is None and time.monotonic() < deadline:
                if not has_children(self._process.pid):  # no stub: it looks once a second, and has nothing left to do
                    time.sleep(PASS_ON_S)
                    break
                time.sleep(0.02)
            self._process.kill()
            self._process.wait()
            if self._process.returncode != 0:
                remove_environment_folder(self.run_dir)
            self._process = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._end_beside(*self._beside)  # after the server, whose last answers they pass
        if self._run_dir is not None:
            self._end_ray()
            self._run_dir.remove(grace_s=0.5)
            self._run_dir = None

    def _restart_server(self) -> None:
        """Ends what is left of it at once: its clients learn of that, and could get nothing from it any more."""
        assert self._run_dir is not None and self._process is not None and self._watch is not None
        self._process.kill()
        self._process.wait()
        self._watch.close()
        self._end_ray()
        end_processes(self.run_dir, 0.0, besides=self.beside_pids)
        self._run_dir.remove_leftovers_of_server()
        self._start_server(Installation.find())

    def _end_ray(self) -> None:
        """Of a cluster of our own the first process; the others are ended with whatever is left of the run."""
        if self._ray is not None:
            self._ray.kill()
            self._ray.wait()
            self._ray = None

    @property
    def _has_scheduler(self) -> bool:
        """Whether the models are ours: that one serves the metrics port."""
        return (self.model_repository / "scheduler").is_dir()

    @property
    def _max_model_len(self) -> int:
        model = self.deployment.model
        return model.limit_model_len(load_model_spec(model.path).max_model_len)

    def _print_stacks(self) -> None:
        assert self._watch is not None
        self._watch.print_stacks()
        time.sleep(STACKS_S)

    def _has_loaded(self) -> bool:
        """Whether every model that has a stub is done with its `initialize`."""
        models = {path.parent.parent.name for path in self.model_repository.glob("*/1/model.py")}
        beats = list(read_heartbeats(self.run_dir).values())
        # The scheduler says so only when it could serve a request.
        loading = {beat.model for beat in beats if not (beat.is_serving or beat.model == "scheduler")}
        return not loading and models == {beat.model for beat in beats}

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
