"""The page beside the API: chat, and both stages as they are now, by the metrics and the fleet's table."""

import asyncio
import time
import urllib.request
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response

from ensemble.serving.control import ControlError, call
from ensemble.serving.fleet_table import FleetTable, ListFleet

FOLDER = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page/page.js": "page.js", "/page/page.css": "page.css"}
# What the page shows: its name for it |-> the metric's. Those of all labels are added up.
NUMBERS = {
    "waiting": "vllm:num_requests_waiting",
    "waiting_tokens": "distserve:num_tokens_waiting",
    "running": "vllm:num_requests_running",
    "bridge": "distserve:num_requests_bridge",
    "swapped": "vllm:num_requests_swapped",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "later_tokens": "vllm:inter_token_latency_seconds_count",  # as they come; other counters know what has ended
    "answers": "vllm:request_success_total",
    "errors": "distserve:request_errors_total",
    "preemptions": "vllm:num_preemptions_total",
    "recoveries": "distserve:recoveries_total",
    "transfers": "distserve:kv_transfer_time_seconds_count",
}
TIMES = {  # histograms, in seconds
    "ttft": "vllm:time_to_first_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
    "transfer": "distserve:kv_transfer_time_seconds",
}
FRESH_S = 0.5  # however many pages ask
TIMEOUT_S = 2.0
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class LivePage:
    """One server's."""

    def __init__(
        self, model: str, max_model_len: int, ask_ready: Callable[[], Awaitable[bool]], metrics_url: str, run_dir: Path
    ) -> None:
        """metrics_url: of the server's metrics; run_dir: where its scheduler takes commands."""
        self._about = {"model": model, "max_model_len": max_model_len}
        self._ask_ready = ask_ready
        self._metrics_url = metrics_url
        self._run_dir = run_dir
        self._state: dict[str, Any] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    def add_to(self, app: FastAPI) -> None:
        for path, name in FILES.items():
            app.add_api_route(path, partial(self._file, name), methods=["GET", "HEAD"])
        app.add_api_route("/page/state", self._answer_state, methods=["GET"])

    async def _file(self, name: str) -> Response:
        return FileResponse(FOLDER / name, headers=HEADERS)

    async def _answer_state(self) -> Response:
        """`numbers`, `times` and `replicas` are null while they cannot be read."""
        async with self._reading:
            if time.monotonic() > self._read_at + FRESH_S:
                is_ready, numbers_and_times, replicas = await asyncio.gather(
                    self._ask_ready(), asyncio.to_thread(self._read_metrics), asyncio.to_thread(self._read_fleet)
                )
                self._state = {**self._about, "is_ready": is_ready, **numbers_and_times, "replicas": replicas}
                self._read_at = time.monotonic()
        return JSONResponse(self._state, headers=HEADERS)

    def _read_metrics(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(self._metrics_url, timeout=TIMEOUT_S) as page:
                totals = totals_of(page.read().decode())
        except OSError:
            return {"numbers": None, "times": None}
        return {
            "numbers": {name: totals[metric] for name, metric in NUMBERS.items()},
            "times": {
                name: {"sum": totals[f"{metric}_sum"], "count": totals[f"{metric}_count"]}
                for name, metric in TIMES.items()
            },
        }

    def _read_fleet(self) -> Any:
        try:
            return msgspec.to_builtins(call(self._run_dir, ListFleet(), FleetTable, TIMEOUT_S).replicas)
        except ControlError:
            return None


def totals_of(metrics: str) -> dict[str, float]:
    """Sample's name |-> its sum over all labels, of a page in Prometheus' text format; 0 for one that is not there."""
    totals: dict[str, float] = defaultdict(float)
    for line in metrics.splitlines():
        if line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            totals[sample.partition("{")[0]] += float(value)
    return totals
