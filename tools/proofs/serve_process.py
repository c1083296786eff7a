"""`python -m tools.serve` as a process of its own: for what looks at it from outside, as its users do."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ensemble.serving.heartbeat import read_heartbeats
from tools.server.ports import Ports, free_ports

STOP_S = 60.0


class ServeProcess:
    """Ready when it has been made. `folder` holds its log, its output and its run directory: a short path."""

    def __init__(self, model: Path, folder: Path, *arguments: str, timeout_s: float = 120.0) -> None:
        *ports, self.openai_port = free_ports(4)
        self.ports = Ports(*ports)
        flags = ["--http-port", self.ports.http, "--grpc-port", self.ports.grpc, "--metrics-port", self.ports.metrics]
        flags += ["--openai-port", self.openai_port, "--model", model, "--log", folder / "log", *arguments]
        self._temporary = folder / "t"
        self._temporary.mkdir()
        self._output = (folder / "output").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.serve", *map(str, flags)],
            stdout=self._output,
            stderr=self._output,
            env={**os.environ, "TMPDIR": str(self._temporary)},
        )
        self.wait_ready(timeout_s)
        wait_until(lambda: "Ready." in self.said(), timeout_s)  # until then a death is a start that has failed

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    @property
    def run_dir(self) -> Path:
        [found] = self._temporary.glob("distserve-????????")
        return found

    def stub(self, model: str) -> int:
        """The process id of a model's stub."""
        return next(beat.pid for beat in read_heartbeats(self.run_dir).values() if beat.model == model)

    def status(self, path: str) -> int:
        """Of an HTTP GET; 0: nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.http_url}{path}", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_ready(self, timeout_s: float) -> float:
        """Seconds that it took."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.said()
            return self.status("/v2/health/ready") == 200

        return wait_until(is_ready, timeout_s)

    def said(self) -> str:
        """What an operator has read so far."""
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self.process.kill()
        self.process.wait()
        self._output.close()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds that it took. Raises TimeoutError."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() > started + timeout_s:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - started
