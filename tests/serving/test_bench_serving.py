"""The load generator against a real server: what was asked for is what is sent, and what it prints adds up."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.errors import ConfigError
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import make_tiny_llama
from tests.serving.clients import read_metrics
from tests.serving.deployments import deploy
from tools.bench_serving import parse_targets, read_trace
from tools.benchmarks.serving_load import Lengths, Served, at, make_inputs, rows
from tools.perf_analyzer import ensure_perf_analyzer
from tools.server.triton_server import TritonServer


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[TritonServer]:
    """One whose counts are of these tests alone."""
    with TritonServer(deploy(tiny_llama)) as server:
        server.wait_ready(timeout_s=120)
        yield server


def test_prompts_have_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model")
    tokenizer = Tokenizer.from_dir(tmp_path / "model")
    lengths = [Lengths(prompt, 4) for prompt in (2, 3, 10, 100, 500)]
    inputs = make_inputs(tokenizer, lengths, random.Random(0))
    assert [len(tokenizer.encode(each["text_input"][0])) for each in inputs] == [2, 3, 10, 100, 500]
    assert len({each["text_input"][0] for each in inputs}) == 5


def test_figures_of_two_requests() -> None:
    served = [
        Served(0.0, [0.1, 0.2, 0.3], num_tokens=3, num_first_tokens=1),
        Served(1.0, [1.4, 2.0], num_tokens=4, num_first_tokens=1),
    ]
    found = {row["name"]: row["value"] for row in rows(served, 20, {"ttft": 200.0, "tpot": 150.0})}
    assert found["duration"] == 2.0
    assert found["output tokens"] == 3.5 and found["input tokens"] == 10.0
    assert found["TTFT, mean"] == pytest.approx(250) and found["TTFT, P99"] == pytest.approx(400)
    assert found["TPOT, mean"] == pytest.approx(150)  # 100 and 200
    assert found["ITL, P99"] == pytest.approx(600)
    assert found["E2E, median"] == pytest.approx(650)
    assert found["SLO attainment, TTFT <= 200 ms and TPOT <= 150 ms"] == 0.5
    assert found["goodput, TTFT <= 200 ms and TPOT <= 150 ms"] == 0.5


def test_a_percentile_is_one_of_the_values() -> None:
    assert [at([1.0, 2.0, 3.0, 4.0], percent) for percent in (1, 25, 26, 50, 99, 100)] == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("wrong", ["ttft", "itl:5", "ttft:fast", "ttft:-1"])
def test_targets_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"--goodput {wrong}: must be"):
        parse_targets([wrong])


def test_a_trace_without_lengths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("ContextTokens\n5\n")
    with pytest.raises(ConfigError, match="needs the columns ContextTokens and GeneratedTokens"):
        read_trace(tmp_path / "trace.csv")


@pytest.mark.server
@pytest.mark.parametrize("when", [["--max-concurrency", "4"], ["--request-rate", "40", "--goodput", "e2e:60000"]])
def test_a_trace_is_served_once(server: TritonServer, tmp_path: Path, when: list[str]) -> None:
    lengths = [(3 + index, 1 + index % 5) for index in range(12)]
    trace, output = tmp_path / "trace.csv", tmp_path / "result.json"
    trace.write_text("ContextTokens,GeneratedTokens\n" + "".join(f"{a},{b}\n" for a, b in lengths))
    before = read_metrics(server.metrics_url)
    command = [sys.executable, "-m", "tools.bench_serving", "--url", server.grpc_url, *when]
    command += ["--model", str(server.deployment.model.path), "--trace", str(trace), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    after = read_metrics(server.metrics_url)

    def counted(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))

    found = {row["name"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    assert found["requests served"] == 12
    if "--request-rate" in when:  # perf_analyzer sends some again before it ends, which do not count
        assert found["SLO attainment, E2E <= 60000 ms"] == 1.0
        assert 0.1 < found["duration"] < 5  # 12 arrivals at 40 a second
    else:
        assert counted("vllm:generation_tokens_total") == sum(b for _, b in lengths)
        assert counted("vllm:prompt_tokens_total") == sum(a for a, _ in lengths)


@pytest.mark.server
def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model")
    ensure_perf_analyzer()
    command = [sys.executable, "-m", "tools.bench_serving", "--url", "localhost:1", "--model", str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: perf_analyzer against localhost:1: ") and result.stderr.count("\n") == 1
