"""The processes of a server: their command lines, their environment, and what has to be in the run directory first."""

import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment, ModelConfig
from ensemble.serving.run_dir import RUN_DIR_VARIABLE
from tools.installation.server_files import Installation, find_libpython
from tools.server.run_dir import shm_prefix

# Of the `answer` model: each sends some 2,500 responses a second on an H100's host (beyond that tokens gather), and has
# its own shared memory.
NUM_ANSWER_INSTANCES = max(1, min(4, len(os.sched_getaffinity(0)) // 4))


def fill_run_dir(
    run_dir: Path,
    installation: Installation,
    model_repository: Path,
    deployment: Deployment,
    http_port: int,
) -> None:
    backend = run_dir / "backends/python"
    backend.mkdir(parents=True)
    for file in installation.backend_files:
        (backend / file.name).symlink_to(file)
    (run_dir / "http-port").write_text(str(http_port), encoding="utf-8")
    (run_dir / "lib").mkdir()
    libpython = find_libpython()
    if libpython is not None:
        (run_dir / "lib" / libpython.name).symlink_to(libpython)
    _link_models(model_repository.resolve(), run_dir / "models")
    (run_dir / "deployment.yaml").write_text(deployment.to_yaml(), encoding="utf-8")


def _link_models(model_repository: Path, folder: Path) -> None:
    folder.mkdir()
    for model in model_repository.iterdir():
        # Of a model that is no more, compiled files are left: the Triton server would not start.
        if not any(path.is_file() and path.suffix != ".pyc" for path in model.rglob("*")):
            continue
        if model.name != "answer":
            (folder / model.name).symlink_to(model)
            continue
        # The number of instances is written here: config.pbtxt cannot say it by the cores.
        (folder / model.name).mkdir()
        (folder / model.name / "1").symlink_to(model / "1")
        config = (model / "config.pbtxt").read_text(encoding="utf-8")
        config, number = re.subn(r"count: \d+", f"count: {NUM_ANSWER_INSTANCES}", config)
        assert number == 1, f"{model}/config.pbtxt has {number} counts of instances"
        (folder / model.name / "config.pbtxt").write_text(config, encoding="utf-8")


def triton_command(
    installation: Installation,
    run_dir: Path,
    *,
    http: tuple[str, int],  # host and port, as the next two
    grpc: tuple[str, int],
    metrics: tuple[str, int],
    num_replicas: int,
    allow_client_shm: bool,
) -> list[str]:
    python_backend = {
        "shm-default-byte-size": 4 << 20,  # five to eight stubs, and room to grow, in the 64 MiB that containers get
        "shm-growth-byte-size": 4 << 20,
        "shm-region-prefix-name": shm_prefix(run_dir),
        "thread-pool-size": 64 + 8 * num_replicas,  # each parked call of the scheduler holds one
        "stub-timeout-seconds": 3600,  # a model is initialised when its workers have loaded their weights
    }
    closed = ",".join(["model-repository", "trace", "logging"] + ["shared-memory"] * (not allow_client_shm))
    options: dict[str, object] = {
        "model-repository": run_dir / "models",
        "backend-directory": run_dir / "backends",
        "http-address": _http_address(http[0]),
        "http-port": http[1],
        "grpc-address": f"[{grpc[0]}]" if ":" in grpc[0] else grpc[0],
        "grpc-port": grpc[1],
        "grpc-infer-allocation-pool-size": 0,  # what is kept for reuse stays as large as the largest request
        "metrics-address": _http_address(metrics[0]),
        "metrics-port": metrics[1],
        "exit-timeout-secs": 2,
        # Closed to all: nobody is told the header that would open them.
        "http-restricted-api": f"{closed}:{secrets.token_hex(8)}={secrets.token_hex(16)}",
        "grpc-restricted-protocol": f"{closed}:{secrets.token_hex(8)}={secrets.token_hex(16)}",
    }
    return [
        str(installation.server),
        *(f"--{name}={value}" for name, value in options.items()),
        "--disable-auto-complete-config",  # stubs would be started twice, once only to be asked for theirs
        *(f"--backend-config=python,{name}={value}" for name, value in python_backend.items()),
    ]


def relay_command(
    host: str, port: int, upstream_port: int, run_dir: Path, *, max_body_bytes: int, allow_client_shm: bool
) -> list[str]:
    arguments = [host, port, upstream_port, run_dir, max_body_bytes]
    arguments += ["allow-client-shm"] if allow_client_shm else []
    return [sys.executable, "-m", "ensemble.serving.http_relay", *map(str, arguments)]


def openai_command(
    model: ModelConfig,
    max_model_len: int,
    host: str,
    port: int,
    *,
    grpc_url: str,
    http_url: str,
    max_body_bytes: int,
    allowed_origins: Sequence[str],
    shown: tuple[str, Path] | None,  # on its page: the metrics' URL, and the run directory; None: there is no page
) -> list[str]:
    arguments: dict[str, object] = {
        "model": model.path,
        "name": model.name,
        "max-model-len": max_model_len,
        "grpc-url": grpc_url,
        "ready-url": f"{http_url}/v2/health/ready",
        "max-body-bytes": max_body_bytes,
        "host": host,
        "port": port,
    }
    if shown is not None:
        arguments |= {"metrics-url": shown[0], "run-dir": shown[1]}
    options = [f"--{name}={value}" for name, value in arguments.items()]
    options += [f"--allowed-origin={origin}" for origin in allowed_origins]
    return [sys.executable, "-m", "ensemble.openai_front", *options]


def environment(run_dir: Path) -> dict[str, str]:
    """Of all of them. The stub finds its packages through the first `python3` on PATH, and ignores PYTHONPATH."""
    return {
        **os.environ,
        "PATH": _prepend(Path(sys.prefix) / "bin", os.environ.get("PATH")),
        "LD_LIBRARY_PATH": _prepend(run_dir / "lib", os.environ.get("LD_LIBRARY_PATH")),
        "PYTHONNOUSERSITE": "1",
        "TMPDIR": str(run_dir),
        DEPLOYMENT_VARIABLE: str(run_dir / "deployment.yaml"),
        RUN_DIR_VARIABLE: str(run_dir),
    }


def _prepend(folder: Path, paths: str | None) -> str:
    return f"{folder}:{paths}" if paths else str(folder)


def _http_address(host: str) -> str:
    """As the Triton server's HTTP library takes it."""
    return f"ipv6:{host}" if ":" in host else host
