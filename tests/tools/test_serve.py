"""`tools.serve` lives through the death of every part, tells why, and ends as an operator expects."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from rich.console import Console
from tritonclient.utils import InferenceServerException

from tests.checkpoints import make_tiny_llama
from tests.serving.clients import Answer, StreamClient, generate
from tools.installation.server_files import ServerError
from tools.proofs.serve_process import ServeProcess, wait_until
from tools.serve import keep_serving
from tools.server.processes import run_pids
from tools.server.run_dir import SHM, RunDir, sweep

pytestmark = pytest.mark.server

KNOWN_WITHIN_S, SERVING_WITHIN_S = 3.0, 60.0  # the second has to hold on a machine that does other things too
SMALL_POOLS = ("--kv-cache-bytes", str(64 << 20))
# So long that none ends by itself before the slowest machine has begun them all.
LONG: dict[str, Any] = {"max_tokens": 60_000, "temperature": 0.0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=65_536)


@pytest.fixture(scope="module")
def serve(model: Path) -> Iterator[ServeProcess]:
    with short_folder() as folder:
        found = ServeProcess(model, folder, *SMALL_POOLS)
        yield found
        found.close()


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Sockets' paths are limited."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as folder:
        yield Path(folder)


class Clients:
    """One of each kind, in the midst of a long answer; and when each knew that it had ended."""

    def __init__(self, serve: ServeProcess) -> None:
        self.ended_at: dict[str, float] = {}
        self.errors: dict[str, Any] = {}
        self._serve = serve
        self._begun = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=each, daemon=True)
            for each in (
                ("grpc", self._grpc),
                ("stream", self._http_stream),
                ("generate", self._http_generate),
                ("openai", self._openai),
            )
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=20), f"{self.errors}\n{serve.said()}"

    def join(self) -> None:
        for thread in self._threads:
            thread.join(KNOWN_WITHIN_S + 30)
            assert not thread.is_alive(), "a client hears nothing"

    def _run(self, name: str, ask: Callable[[], Any]) -> None:
        try:
            self.errors[name] = ask()
        except Exception as error:
            self.errors[name] = error
        self.ended_at[name] = time.monotonic()

    def _grpc(self) -> Any:
        client = StreamClient(self._serve.grpc_url)
        client.send("scheduler", "0", input_ids=[9, 8], **LONG)
        wait_until(lambda: len(client.answers["0"].responses) > 1 or client.answers["0"].error is not None, 20)
        self._begun.release()
        return client.wait()["0"].error

    def _http_stream(self) -> Any:
        response = self._post("generate_stream", LONG)
        first = response.readline()
        self._begun.release()
        response.read()
        return None if first else "nothing came"

    def _http_generate(self) -> Any:
        self._begun.release()
        response = self._post("generate", {**LONG, "stream": False})
        return response.status, json.load(response)

    def _openai(self) -> Any:
        """The last event of a stream."""
        url = f"http://127.0.0.1:{self._serve.openai_port}/v1"
        with urllib.request.urlopen(f"{url}/models", timeout=10) as models:
            name = json.load(models)["data"][0]["id"]
        body = json.dumps({"model": name, "prompt": "x", **LONG}).encode()
        with urllib.request.urlopen(f"{url}/completions", body, timeout=60) as response:
            response.readline()
            self._begun.release()
            *_, last = response.read().strip().splitlines()
        return json.loads(last.removeprefix(b"data: "))

    def _post(self, endpoint: str, values: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._serve.ports.http, timeout=60)
        connection.request("POST", f"/v2/models/ensemble/{endpoint}", json.dumps({"text_input": "x", **values}))
        return connection.getresponse()


@pytest.mark.parametrize(
    ("stub", "number", "reason"),
    [
        ("scheduler", signal.SIGKILL, "ended: killed by signal 9, SIGKILL"),
        ("answer", signal.SIGSTOP, "has stood still for 2 s"),
    ],
)
def test_a_stub_that_ends_or_hangs(serve: ServeProcess, stub: str, number: int, reason: str) -> None:
    serve.wait_ready(SERVING_WITHIN_S)
    clients = Clients(serve)
    pid = serve.stub(stub)
    os.kill(pid, number)
    harmed_at = time.monotonic()
    clients.join()
    late = {name: at - harmed_at for name, at in clients.ended_at.items() if at - harmed_at > KNOWN_WITHIN_S + 1.0}
    assert not late, "3 s, and one for a machine that does other things too"
    assert isinstance(clients.errors["grpc"], InferenceServerException)
    assert isinstance(clients.errors["stream"], http.client.IncompleteRead)
    status, body = clients.errors["generate"]
    assert (status, body) == (503, {"error": "the Triton server does not answer"})
    assert clients.errors["openai"]["error"]["code"] == "unavailable"
    assert serve.status("/v2/health/ready") == 503
    assert serve.status("/v2/health/live") == 200
    wait_until(lambda: serve.status("/v2/health/ready") == 200, SERVING_WITHIN_S)
    assert f"the {stub} stub (process {pid}) {reason}; starting it again" in serve.said()
    assert generate(serve.grpc_url, "ensemble", text_input="x", max_tokens=3, temperature=0.0).text
    wait_until(lambda: "Ready again" in serve.said(), SERVING_WITHIN_S)


def test_malformed_streams_that_abort_the_server_cost_a_restart(serve: ServeProcess) -> None:
    """Any client can do that to the 24.10 server: a good request to one model, then a BYTES tensor that lies to one
    that is decoupled."""
    before = serve.said().count("starting it again")

    def attack() -> None:
        client = StreamClient(serve.grpc_url)
        with contextlib.suppress(Exception):
            good = grpc.InferInput("text_input", [1], "BYTES")
            good.set_data_from_numpy(np.array([b"x"], dtype=object))
            client.send_inputs("preprocess", "good", [good])
            lying = grpc.InferInput("text_input", [1], "BYTES")
            lying.set_data_from_numpy(np.array([b"x"], dtype=object))
            lying._raw_content = b"\xff\xff\xff\x7fx"
            client.send_inputs("scheduler", "lying", [lying])
            client.wait(timeout_s=1)
        with contextlib.suppress(Exception):
            client.close(cancel=True)

    deadline = time.monotonic() + 60
    while serve.said().count("starting it again") == before and time.monotonic() < deadline:
        threads = [threading.Thread(target=attack, daemon=True) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    wait_until(lambda: serve.said().count("starting it again") > before, 5.0)
    said = serve.said().replace("\n", " ")
    assert re.search(r"the Triton server ended: killed by signal \d+", said), said
    wait_until(lambda: serve.status("/v2/health/ready") == 200, SERVING_WITHIN_S)
    assert generate(serve.grpc_url, "ensemble", text_input="x", max_tokens=3, temperature=0.0).text


def test_sigterm_drains(serve: ServeProcess) -> None:
    """The last test of this server. What runs ends; what is new is refused; what is left over has an error."""
    begun = threading.Event()
    ending: list[Answer] = []

    def ask() -> None:
        client = StreamClient(serve.grpc_url)
        client.send("ensemble", "0", text_input="x", **{**LONG, "max_tokens": 3000})
        wait_until(lambda: len(client.answers["0"].responses) > 1, 20)
        begun.set()
        ending.append(client.wait()["0"])
        client.close()

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(30)
    run_dir = serve.run_dir
    serve.process.send_signal(signal.SIGTERM)
    wait_until(lambda: serve.status("/v2/health/ready") == 503, 5.0)
    assert serve.status("/v2/health/live") == 200
    if thread.is_alive():
        with pytest.raises(InferenceServerException, match="the server is draining"):
            generate(serve.grpc_url, "scheduler", input_ids=[5], max_tokens=3)
    thread.join(40)
    assert ending[0].error is None
    assert serve.process.wait(30) == 0
    assert not run_dir.exists()


def test_a_drain_has_an_end_and_sigkill_leaves_nothing(model: Path) -> None:
    with (
        short_folder() as folder,
        contextlib.closing(ServeProcess(model, folder, *SMALL_POOLS, "--drain-timeout", "0")) as serve,
    ):
        clients = Clients(serve)
        serve.process.send_signal(signal.SIGINT)
        clients.join()
        assert "the server is stopping" in str(clients.errors["grpc"])
        assert "the server is stopping" in str(clients.errors["generate"])
        assert serve.process.wait(30) == 0
    with short_folder() as folder, contextlib.closing(ServeProcess(model, folder, *SMALL_POOLS)) as serve:
        run_dir = serve.run_dir
        os.kill(serve.stub("decode"), signal.SIGSTOP)  # not even this keeps anything alive
        serve.process.kill()
        serve.process.wait()
        wait_until(lambda: not any(run_pids(run_dir)), 30)
        wait_until(lambda: not run_dir.exists(), 10)
        assert not list(SHM.glob(f"*{run_dir.name}*"))


class Dying:
    """A server that ends at once, always."""

    num_starts = 0

    def wait(self) -> str:
        return "the scheduler stub ended"

    def restart(self) -> None:
        self.num_starts += 1

    def wait_ready(self) -> None:
        if self.num_starts == 2:
            raise ServerError("no port")


def test_a_server_that_keeps_ending_is_given_up() -> None:
    server = Dying()
    with Path("/dev/null").open("w") as quiet, pytest.raises(ServerError, match="5 restarts in 10 minutes"):
        keep_serving(server, Console(file=quiet), 5)  # type: ignore[arg-type]
    assert server.num_starts == 5
    with Path("/dev/null").open("w") as quiet, pytest.raises(ServerError, match="the scheduler stub ended"):
        keep_serving(Dying(), Console(file=quiet), 0)  # type: ignore[arg-type]


ABANDON = """
import os, signal, subprocess, sys, time
from tools.server.run_dir import RunDir
from ensemble.serving.run_dir import RUN_DIR_VARIABLE
run = RunDir()
child = subprocess.Popen(
    ["sleep", "600"], env={RUN_DIR_VARIABLE: str(run.path)}, start_new_session=True, stdout=-3, stderr=-3
)
run._reaper.kill()
print(run.path, child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_start_sweeps_what_a_killed_one_and_its_killed_reaper_left() -> None:
    with short_folder() as folder:
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.run(
            [sys.executable, "-c", ABANDON], env=environment, capture_output=True, text=True, check=False
        )
        run_dir = Path(process.stdout.split()[0])
        region = SHM / f"triton_python_backend_shm_region_{run_dir.name}_x"
        region.write_bytes(b"x")
        assert run_dir.exists()
        assert any(run_pids(run_dir))
        living = RunDir()
        try:
            sweep(folder)
            sweep(living.path.parent)
            assert not run_dir.exists()
            assert not region.exists()
            assert not any(run_pids(run_dir))
            assert living.path.exists()
        finally:
            living.remove(0.0)
        assert not living.path.exists()
