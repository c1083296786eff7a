"""Serves the metrics: the Triton server's own page, then ours, at the port that operators know.

The environment says where (`DISTSERVE_METRICS`, three words: host, port, and the port at which the Triton server has
its page, 0 for none); without it, as under a `tritonserver` that was started by hand, ours is not served.
"""

import http.client
import os
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from ensemble.errors import ConfigError
from ensemble.listener import listen
from ensemble.threads import start_vital_thread

METRICS_VARIABLE = "DISTSERVE_METRICS"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BACKLOG = 64
MAX_CONNECTIONS = 64  # a thread each, in the scheduler's process
CLOSING_S = 0.25  # in which it looks whether it is closed
CLIENT_S, UPSTREAM_S = 10.0, 5.0  # deadlines of a request's reading, and of the Triton server's page


class MetricsPage:
    """Answers on threads of its own, one a connection."""

    def __init__(self, host: str, port: int, upstream_port: int, read_text: Callable[[], str]) -> None:
        """Raises ConfigError if it cannot listen there."""
        self._upstream_port = upstream_port
        self._read_text = read_text
        try:
            self._server = _Server(self, host, port)
        except OSError as error:
            raise ConfigError(f"metrics cannot listen on {host}:{port}: {error.strerror}") from None
        self._thread = start_vital_thread(lambda: self._server.serve_forever(CLOSING_S), "metrics page")

    @classmethod
    def from_environment(cls, read_text: Callable[[], str]) -> "MetricsPage | None":
        """None: the environment names no place. Raises ConfigError."""
        place = os.environ.get(METRICS_VARIABLE)
        if place is None:
            return None
        try:
            host, port, upstream_port = place.split()
            return cls(host, int(port), int(upstream_port), read_text)
        except ValueError:
            raise ConfigError(f"{METRICS_VARIABLE} = {place!r}: HOST PORT UPSTREAM_PORT is allowed") from None

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=1.0)

    def text(self) -> str:
        """Raises OSError as long as the Triton server's part is not to be had."""
        return (self._upstream_text() if self._upstream_port else "") + self._read_text()

    def _upstream_text(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=UPSTREAM_S)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            body = response.read()
            if response.status != HTTPStatus.OK:
                raise OSError(f"it answered {response.status}")
            return body.decode()
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, page: MetricsPage, host: str, port: int) -> None:
        self.page = page
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(host, port, BACKLOG)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Who finds no place is closed at once: nobody reads this page a hundred times at a time."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started, which would give the place back
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news either."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout: ClassVar[float] = CLIENT_S
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "distserve", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "the metrics are at /metrics\n")
            return
        try:
            text = self.server.page.text()
        except OSError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"the Triton server's metrics are not there: {error}\n")
            return
        self._answer(HTTPStatus.OK, text)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
