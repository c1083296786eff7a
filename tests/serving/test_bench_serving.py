"""The load generator against a real server: what was asked for is what is sent, and what it prints adds up."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.clients import read_metrics
from tests.serving.deployments import deploy
from tools.server.triton_server import TritonServer


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[TritonServer]:
    """One whose counts are of these tests alone."""
    with TritonServer(deploy(tiny_llama)) as server:
        server.wait_ready(timeout_s=120)
        yield server


def bench(server: TritonServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench_serving", "--url", server.grpc_url]
    command += ["--model", str(server.deployment.model.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.server
def test_a_trace_is_served_once_and_the_figures_are_those_of_the_records(server: TritonServer, tmp_path: Path) -> None:
    """Exact ids to `scheduler`: as many tokens are counted there as the trace has, in and out."""
    lengths = [(3 + index, 1 + index % 5) for index in range(12)]
    trace = tmp_path / "trace.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n" + "".join(f"{a},{b}\n" for a, b in lengths))
    before = read_metrics(server.metrics_url)
    arguments = ["--dataset-name", "trace", "--dataset-path", str(trace), "--num-prompts", "12", "--num-warmups", "0"]
    arguments += ["--request-rate", "40", "--endpoint", "scheduler", "--goodput", "ttft:60000", "e2el:60000"]
    result = bench(
        server, *arguments, "--max-lag-ms", "10000", "--result-dir", str(tmp_path), "--result-filename", "found.json"
    )
    assert result.returncode == 0, result.stderr
    after = read_metrics(server.metrics_url)

    def counted(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))

    assert counted("vllm:generation_tokens_total") == sum(b for _, b in lengths)
    assert counted("vllm:prompt_tokens_total") == sum(a for a, _ in lengths)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["completed"] == 12 and found["failed"] == 0 and found["slo_attainment"] == 1.0
    assert sorted(zip(found["input_lens"], found["output_lens"], strict=True)) == sorted(lengths)
    assert found["total_output_tokens"] == sum(b for _, b in lengths)
    assert all({"queue", "prefill", "decode"} <= record["phases"].keys() for record in found["records"])
    assert [len(record["times"]) - 1 for record in found["records"] if record["times"]] == list(map(len, found["itls"]))
    shown = dict(re.findall(r"^(.*\S):\s+([\d.]+)$", result.stdout, re.MULTILINE))
    assert int(shown["Successful requests"]) == 12
    assert float(shown["Mean TTFT (ms)"]) == pytest.approx(1e3 * sum(found["ttfts"]) / 12, abs=0.01)


@pytest.mark.server
def test_a_late_client_and_failed_requests_are_told(server: TritonServer) -> None:
    few = ["--num-prompts", "4", "--input-len", "8", "--output-len", "2"]
    result = bench(server, *few, "--max-lag-ms", "0")
    assert result.returncode == 1 and "INVALID: the client itself was late" in result.stdout
    too_long = bench(server, "--num-prompts", "1", "--input-len", "510")
    assert too_long.returncode == 1 and re.search(r"^error: request 0: 510 tokens .* length is 512", too_long.stderr)


@pytest.mark.server
def test_perf_analyzer_is_another_client(server: TritonServer) -> None:
    few = ["--num-prompts", "6", "--input-len", "8", "--output-len", "4", "--max-concurrency", "2"]
    result = bench(server, *few, "--client", "perf_analyzer")
    assert result.returncode == 0, result.stderr
    assert re.search(r"Total generated tokens: +24\n", result.stdout)
