"""What an operator types: `tools.serve`, `tools.demo`, `tools.client`, as programs."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny_llama
from tools.server.ports import Ports, free_ports
from tools.server.processes import session_pids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def environment(model: Path, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "MODEL": str(model)}


def run(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    how = [] if arguments[0] == "-c" else ["-m"]
    return subprocess.run([sys.executable, *how, *arguments], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.server
def test_serve_prints_a_line_that_works_when_pasted_and_ctrl_c_ends_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """With a cache that cannot be written, as a container's volume of models may be."""
    log = tmp_path / "server.log"
    (tmp_path / "no folder").touch()
    environment["XDG_CACHE_HOME"] = str(tmp_path / "no folder")
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "OPENAI_PORT"), map(str, free_ports(4)), strict=True))
    environment |= ports
    command = [sys.executable, "-m", "tools.serve", "--kv-cache-bytes", str(16 << 20), "--log", str(log)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as serve:
        assert serve.stdout is not None
        curls = itertools.islice((line for line in serve.stdout if line.startswith("curl ")), 2)
        answer, openai_answer = (
            subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60).stdout for curl in curls
        )
        children = Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split()
        url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
        client = run("tools.client", "Hello", "--url", url, "--max-tokens", "4", env=environment)
        started = time.monotonic()
        serve.send_signal(signal.SIGINT)
        assert serve.wait(30) == 0
        assert time.monotonic() - started < 10
    assert json.loads(answer)["text_output"]
    assert json.loads(openai_answer)["choices"][0]["text"] == json.loads(answer)["text_output"]
    assert client.returncode == 0 and client.stdout.strip()
    assert "Started HTTPService" in log.read_text()
    assert not [pid for child in children for pid in session_pids(int(child))]


@pytest.mark.server
def test_demo_streams_an_answer_and_says_where_the_time_went(environment: dict[str, str]) -> None:
    environment |= {"PROMPT": 'It\'s a "prompt" with $signs', "MAX_TOKENS": "9"}
    result = run("tools.demo", env=environment)
    assert result.returncode == 0, result.stderr
    assert 'It\'s a "prompt" with $signs' in result.stdout
    assert re.search(r"Tokens +\d+ in, [1-9] out \(finish reason: (length|stop)\)", result.stdout)
    times = dict(re.findall(r"^ *(\w+) +([\d.]+) ms", result.stdout, re.MULTILINE))
    parts = sum(float(times[name]) for name in ("front", "queue", "prefill", "bridge", "handoff", "decode", "back"))
    assert parts == pytest.approx(float(times["total"]), abs=1.0)
    assert 0 < float(times["TTFT"]) <= float(times["total"])
    assert result.stdout.rstrip().endswith("Server stopped")


@pytest.mark.server
def test_demo_fails_when_the_answer_does_not_come(environment: dict[str, str]) -> None:
    result = run("tools.demo", "--max-tokens", "100000", env=environment)
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*max_tokens.*\n", result.stderr)
    assert result.stdout.endswith("\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tools.demo", "--max-tokens", "0"], "'--max-tokens' .*greater than or equal to 1"),
        (["tools.client", "Hello", "--temperature", "-1"], "'--temperature'.*greater than or equal to 0"),
        (["tools.bench_serving", "--client", "vllm"], "--client vllm: must be ours or perf_analyzer"),
        (
            ["tools.bench_serving", "--url", "http://localhost:8000"],
            "--url http://localhost:8000: must be HOST:PORT .*",
        ),
        (["tools.fleet"], "a command is needed: list, add, .*"),
    ],
)
def test_what_can_be_refused_at_once_is(environment: dict[str, str], command: list[str], message: str) -> None:
    result = run(*command, env=environment)
    assert result.returncode in (1, 2) and result.stdout == ""
    assert re.fullmatch(f"error: .*{message}\n", result.stderr)


def test_an_interrupted_command_says_so_to_its_shell_and_nothing_to_its_user(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tools.client"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as chat:
        assert chat.stdout is not None and chat.stderr is not None
        assert chat.stdout.read(2) == b"> "
        while chat.poll() is None:  # one that comes just before it reads is seen with the next
            chat.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.wait(0.5)
        assert chat.returncode == 130
        assert chat.stderr.read() == b""
    while_it_imports = run("-c", "import tools; raise KeyboardInterrupt", env=environment)
    assert while_it_imports.returncode != 0 and while_it_imports.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model: no such directory"),
        (["--http-port", "many"], "--http-port"),
        (["--dtype", "int8"], "model.dtype = 'int8'"),
        (["--deployment", "/no/such/file"], "/no/such/file: No such file"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_an_operators_error_is_one_line(environment: dict[str, str], arguments: list[str], message: str) -> None:
    result = run("tools.serve", *arguments, env=environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert re.fullmatch(r"error: .*\n", result.stderr)
    assert result.stdout == ""


@pytest.mark.server
def test_a_stage_that_cannot_start_is_one_line_too(environment: dict[str, str]) -> None:
    result = run("tools.serve", "--kv-cache-bytes", "64", env=environment)
    assert result.returncode == 1
    assert re.search(r"\Aerror: .*too small for one block.*\Z", result.stderr.splitlines()[-1])


def test_client_without_a_server_is_one_line(environment: dict[str, str]) -> None:
    ports = Ports.free()
    result = run("tools.client", "Hello", "--url", f"http://127.0.0.1:{ports.http}", env=environment)
    assert result.returncode == 1
    assert re.fullmatch(r"error: http://127\.0\.0\.1:\d+: .*refused.*\n", result.stderr)
