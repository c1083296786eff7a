"""Clients that others wrote get what plain HTTP gives: litellm by both providers that know us, aiperf, genai-perf.

aiperf and genai-perf bring a hundred packages each: they are taken where they are on PATH.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.proofs.openai_clients import aiperf_rows, litellm_rows
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server


def test_litellm(openai_server: TritonServer) -> None:
    rows = list(litellm_rows(openai_server, Path(sys.executable)))
    assert len(rows) == 6
    assert [row["name"] for row in rows if not row["met"]] == []


def test_aiperf(openai_server: TritonServer) -> None:
    aiperf = on_path("aiperf")
    rows = list(aiperf_rows(openai_server, aiperf))
    assert [row["name"] for row in rows if row.get("met") is False] == []


def test_genai_perf(openai_server: TritonServer, tmp_path: Path) -> None:
    on_path("genai-perf")
    model, num_requests, num_tokens = openai_server.deployment.model, 8, 6
    options = {
        "-m": model.name,
        "--endpoint-type": "chat",
        "--url": openai_server.page_url.removeprefix("http://").removesuffix("/"),
        "--tokenizer": model.path,
        "--synthetic-input-tokens-mean": 20,
        "--output-tokens-mean": num_tokens,
        "--extra-inputs": "ignore_eos:true",
        "--concurrency": 2,
        "--request-count": num_requests,
        "--warmup-request-count": 0,
        "--artifact-dir": tmp_path,
    }
    command = [sys.executable, "-m", "tools.genai_perf", "profile", "--streaming"]
    command += [str(part) for option in options.items() for part in option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    (export,) = tmp_path.rglob("profile_export_genai_perf.json")
    found = json.loads(export.read_text())
    assert found["request_count"]["avg"] == num_requests
    assert 0 < found["time_to_first_token"]["avg"] < found["request_latency"]["avg"]


def on_path(program: str) -> Path:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} on PATH: it installs by pip, in an environment of its own")
    return Path(found)
