"""How long a server of LLaMA-2-7B's shape takes from its start to ready, with cold and with warm kernel caches.

    python -m tools.benchmarks.start --output docs/results/start.json

Dummy weights, fp16; disaggregated, both stages on one GPU, and colocated. And the first request after that.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble.config import GPU_BLOCK_SIZE, Deployment
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.results import report
from tools.installation.server_files import ServerError
from tools.proofs.gpu_smoke import greedy_inputs, write_model_dir
from tools.proofs.grpc_request import ask
from tools.server.triton_server import TritonServer

MODEL = "LLaMA-2-7B"
SHARE = {"disaggregated": 0.45, "colocated": 0.9}  # of the GPU, for a worker
PROMPT = list(range(3, 515))
GOAL_S = 20.0  # with warm caches
REQUEST_TIMEOUT_S = 60.0


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the servers' logs here")] = None,
) -> None:
    """Starts each server twice; exit status 1 if one with warm caches takes longer than its goal."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model_dir(path, SHAPES[MODEL].config)
        for mode in SHARE:
            for caches in ("as found", "warm"):
                name = f"{MODEL}, {mode}, caches {caches}"
                log = (log_dir or Path(folder)) / f"{mode}-{caches.replace(' ', '-')}.log"
                ready_s, first_token_s = start(deployment(path, mode), log)
                met = ready_s <= GOAL_S if caches == "warm" else None
                goal = GOAL_S if caches == "warm" else None
                rows += [
                    {"name": f"{name}: start to ready", "value": ready_s, "unit": "s", "goal": goal, "met": met},
                    {"name": f"{name}: first request, one token", "value": first_token_s, "unit": "s"},
                ]
    report(rows, output)


def deployment(path: Path, mode: str) -> Deployment:
    stage = {"devices": ["cuda:0"], "gpu_memory_utilization": SHARE[mode]}
    return Deployment.parse(
        {
            "mode": mode,
            "model": {"path": path, "dtype": "float16", "load_format": "dummy"},
            "prefill": stage | ({"devices": []} if mode == "colocated" else {}),
            "decode": stage,
            "block_size": GPU_BLOCK_SIZE,
        }
    )


def start(deployment: Deployment, log: Path, timeout_s: float = 300.0) -> tuple[float, float]:
    """Seconds to ready, and of the first request after that."""
    begin = time.perf_counter()
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=timeout_s)
        ready_s = time.perf_counter() - begin
        begin = time.perf_counter()
        answer = ask(server.grpc_url, greedy_inputs(PROMPT, 1), REQUEST_TIMEOUT_S)
        first_token_s = time.perf_counter() - begin
    if answer.error is not None or not answer.has_ended:
        raise ServerError(f"the first request: {answer.error or 'no answer'}")
    return round(ready_s, 2), round(first_token_s, 3)


if __name__ == "__main__":
    typer.run(main)
