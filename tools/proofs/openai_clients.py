"""Clients that others wrote, on a server of a tiny model: `aiperf`, and `litellm` with both providers that know us.

    python -m tools.proofs.openai_clients --output docs/results/openai-clients.json

They are large and pin their own packages, so they are installed into an environment of their own: a temporary one, or
the one of --environment, which is kept. Every answer of litellm has to be the one that plain HTTP gives.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from ensemble.errors import DistServeError
from tools.benchmarks.results import exactly, report
from tools.command_line import run
from tools.server.ports import free_ports
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

PACKAGES = ("aiperf", "litellm")
CALLS = Path(__file__).with_name("litellm_calls.py")
NUM_REQUESTS, CONCURRENCY = 40, 4
INPUT_LEN, OUTPUT_LEN = 64, 32
PROMPT = "Once upon a time"
MAX_TOKENS = 12
TIMEOUT_S = 300


class ClientFailed(DistServeError):
    """A client cannot be installed, or fails."""


def main(
    environment: Annotated[
        Path | None, Option(help="virtual environment for the clients; none: a temporary one")
    ] = None,
    output: Annotated[Path | None, Option(help="JSON file for the results")] = None,
) -> None:
    """Fails unless every client gets what it asks for."""
    with client_python(environment) as python, tiny_server(openai_port=free_ports(1)[0]) as server:
        rows = [*litellm_rows(server, python), *aiperf_rows(server, python.with_name("aiperf"))]
    report(rows, output)


@contextlib.contextmanager
def client_python(environment: Path | None) -> Iterator[Path]:
    """The interpreter of an environment that has PACKAGES."""
    with tempfile.TemporaryDirectory() as folder:
        path = environment or Path(folder)
        python = path / "bin/python"
        if not python.exists():
            Console(stderr=True).print(f"Installing {' and '.join(PACKAGES)}")
            call(sys.executable, "-m", "venv", path)
        call(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *PACKAGES, timeout_s=1200)
        yield python


def litellm_rows(server: TritonServer, python: Path) -> Iterator[dict[str, Any]]:
    name = server.deployment.model.name
    asked = {"model": name, "max_tokens": MAX_TOKENS, "temperature": 0}
    messages = [{"role": "user", "content": PROMPT}]
    chat = post(f"{server.openai_url}/chat/completions", {**asked, "messages": messages})
    completion = post(f"{server.openai_url}/completions", {**asked, "prompt": PROMPT})
    generate_url = f"{server.http_url}/v2/models/ensemble/generate"
    direct = post(generate_url, {"text_input": PROMPT, "temperature": 0, "max_tokens": MAX_TOKENS})
    expected = {
        "openai/ chat": chat["choices"][0]["message"]["content"],
        "openai/ chat, streamed": chat["choices"][0]["message"]["content"],
        "openai/ completion": completion["choices"][0]["text"],
        "triton/ generate": direct["text_output"],
        "triton/ generate, streamed": direct["text_output"],
    }
    told = {"openai_url": server.openai_url, "generate_url": generate_url, "prompt": PROMPT, **asked}
    found = json.loads(call(python, CALLS, json.dumps(told)).splitlines()[-1])
    for each, text in expected.items():
        yield exactly(f"litellm, {each}: answers as by plain HTTP", int(found["answers"][each] == text), "of 1", 1)
    is_told = int(found["error"] == "NotFoundError")
    yield exactly("litellm, openai/, another model: is told so", is_told, "of 1", 1)


def aiperf_rows(server: TritonServer, aiperf: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model": server.deployment.model.name,
            "url": server.openai_url.removesuffix("/v1"),
            "endpoint-type": "chat",
            "tokenizer": server.deployment.model.path,
            "concurrency": CONCURRENCY,
            "request-count": NUM_REQUESTS,
            "isl": INPUT_LEN,
            "osl": OUTPUT_LEN,
            "extra-inputs": "ignore_eos:true",
            "ui": "none",
            "output-artifact-dir": folder,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        call(aiperf, "profile", "--streaming", *arguments)
        (export,) = Path(folder).rglob("profile_export_aiperf.json")
        found = json.loads(export.read_text(encoding="utf-8"))
    yield exactly("aiperf, chat: requests served", int(found["request_count"]["avg"]), "", NUM_REQUESTS)
    yield exactly("aiperf, chat: errors", len(found.get("error_summary") or []), "", 0)
    for name, unit in {
        "time_to_first_token": "ms",
        "inter_token_latency": "ms",
        "output_token_throughput": "tokens/s",
    }.items():
        yield {
            "name": f"aiperf, chat: {name.replace('_', ' ')}, mean",
            "value": round(found[name]["avg"], 2),
            "unit": unit,
        }


def post(url: str, body: dict[str, Any]) -> Any:
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as response:
        return json.load(response)


def call(*command: str | Path, timeout_s: float = TIMEOUT_S) -> str:
    """What it prints. Raises ClientFailed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if result.returncode:
        raise ClientFailed(f"{command[0]}: {(result.stdout + result.stderr)[-2000:]}")
    return result.stdout


if __name__ == "__main__":
    run(main)
