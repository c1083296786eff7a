"""NVIDIA's own load generator drives the server over gRPC streaming without an error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.perf_analyzer import ensure_perf_analyzer
from tools.server.triton_server import TritonServer

NUM_REQUESTS = 20
ROOT = Path(__file__).parents[2]


@pytest.mark.server
@pytest.mark.parametrize("model", ["ensemble", "scheduler"])
def test_perf_analyzer_runs_without_an_error(model: str, tiny_server: TritonServer, tmp_path: Path) -> None:
    program, environment = ensure_perf_analyzer()
    version = subprocess.run([program, "--version"], env=environment, capture_output=True, text=True)
    if version.returncode:
        pytest.skip(f"perf_analyzer does not run on this system: {version.stderr.strip()}")
    inputs, export = tmp_path / "inputs.json", tmp_path / "export.json"
    request = {"text_input": ["Once upon a time"], "max_tokens": [8], "stream": [True], "ignore_eos": [True]}
    inputs.write_text(json.dumps({"data": [request]}))
    command = [str(program), "-m", model, "-u", tiny_server.grpc_url, "-i", "grpc", "--async", "--streaming"]
    command += ["--input-data", str(inputs), "--profile-export-file", str(export), "--concurrency-range", "4"]
    command += ["--request-count", str(NUM_REQUESTS), "--stability-percentage", "999"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    (experiment,) = json.loads(export.read_text())["experiments"]
    requests = experiment["requests"]
    assert len(requests) >= NUM_REQUESTS
    for each in requests:
        assert 1 <= len(each["response_timestamps"]) <= 8
        assert each["response_timestamps"] == sorted(each["response_timestamps"])


@pytest.mark.server
def test_the_readmes_command(tiny_server: TritonServer, tmp_path: Path) -> None:
    """As it stands there, but for the port and the file."""
    program, environment = ensure_perf_analyzer()
    if subprocess.run([program, "--version"], env=environment, capture_output=True).returncode:
        pytest.skip("perf_analyzer does not run on this system")
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^echo '.*\n\.venv/bin/python -m tools\.perf_analyzer .*\\\n.*$", readme, re.MULTILINE)
    assert command is not None
    file = str(tmp_path / "inputs.json")
    here = {".venv/bin/python": sys.executable, "localhost:8001": tiny_server.grpc_url, " /tmp/inputs.json": f" {file}"}
    text = command.group()
    for word, ours in here.items():
        assert word in text
        text = text.replace(word, ours)
    result = subprocess.run(["bash", "-ec", text], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Concurrency: 4, throughput: \d", result.stdout)
