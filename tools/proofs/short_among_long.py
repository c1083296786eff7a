"""What preemption gives a short request that comes after long ones, through the flags of `tools.serve` alone.

    python -m tools.proofs.short_among_long --output docs/results/short-among-long.json

The decode pool holds some four of 24 requests of 120 tokens; what is preempted is swapped to half a GiB of host memory.
A second after them comes a request of 10 tokens. Both policies must give the same outputs. Two
minutes on two cores.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tools.benchmarks.results import at_least, at_most, exactly, report
from tools.installation.default_model import ensure_default_model
from tools.proofs.grpc_request import Answer, Inputs, ask
from tools.proofs.serve_process import ServeProcess
from tools.server.server_state import Metrics

NUM_LONG, LONG_TOKENS, SHORT_TOKENS = 24, 120, 10
NUM_BLOCKS, BLOCK_BYTES = (
    40,
    30 * 2 * 3 * 16 * 64 * 4,
)  # of SmolLM2-135M in float32: layers, KV, heads, tokens, head_dim
SWAP_GIB = 0.5
SHORT_AFTER_S = 1.0
TIMEOUT_S = 300.0
METRICS = {
    "preemptions": "vllm:num_preemptions_total",
    "bytes swapped": "distserve:swap_bytes_total",
}
FLAGS = ("--dtype", "float32", "--kv-cache-bytes", NUM_BLOCKS * BLOCK_BYTES, "--swap-space", SWAP_GIB)


def make_request(index: int, max_tokens: int) -> Inputs:
    return {
        "input_ids": np.array([100 + index, 200, 300], np.int32),
        "max_tokens": np.array([max_tokens], np.int32),
        "temperature": np.zeros(1, np.float32),
        "ignore_eos": np.ones(1, bool),
        "return_output_ids": np.ones(1, bool),
    }


REQUESTS = [make_request(index, LONG_TOKENS) for index in range(NUM_LONG)] + [make_request(NUM_LONG, SHORT_TOKENS)]


def serve(model: Path, folder: Path, policy: str) -> ServeProcess:
    resident = ("--max-num-resident-seqs", 2 * NUM_LONG)
    folder.mkdir()
    return ServeProcess(model, folder, *map(str, (*FLAGS, "--decode-policy", policy, *resident)))


def run(server: ServeProcess) -> list[Answer]:
    """The answers of the long requests, and last that of the short one, which comes later."""
    answers: dict[int, Answer] = {}

    def send(index: int) -> None:
        answers[index] = ask(server.grpc_url, REQUESTS[index], TIMEOUT_S)

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(REQUESTS))]
    for thread in threads[:-1]:
        thread.start()
    time.sleep(SHORT_AFTER_S)
    threads[-1].start()
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(REQUESTS))]


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None) -> None:
    """Exit status 1 if a goal was missed."""
    model = ensure_default_model()
    rows: list[dict[str, Any]] = []
    short_s: dict[str, float] = {}
    output_ids: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as name:
        for policy in ("fcfs", "mlfq"):
            server = serve(model, Path(name) / policy, policy)
            try:
                before = Metrics(server)
                answers = run(server)
                time.sleep(2.0)  # the metrics come once a second
                after = Metrics(server)
            finally:
                server.close()
            output_ids[policy] = [each.output_ids for each in answers]
            short_s[policy] = answers[-1].ended_at - answers[-1].sent_at
            long_s = max(each.ended_at - each.sent_at for each in answers[:-1])
            rows += [
                exactly(f"{policy}: requests that failed", sum(not each.responses for each in answers), "requests", 0),
                {"name": f"{policy}: the last long request", "value": round(long_s, 2), "unit": "s"},
                {"name": f"{policy}: the short request", "value": round(short_s[policy], 2), "unit": "s"},
            ]
            for title, metric in METRICS.items():
                number = after.total(metric) - before.total(metric)
                label = f"{policy}: {title}"
                row = {"name": label, "value": number, "unit": ""}
                rows.append(row if policy == "fcfs" else at_least(label, number, "", 1))
    differ = sum(one != other for one, other in zip(output_ids["fcfs"], output_ids["mlfq"], strict=True))
    rows.append(exactly("outputs that differ between the policies", differ, "requests", 0))
    ratio = short_s["mlfq"] / short_s["fcfs"]
    rows.append(at_most("short request, mlfq of fcfs", round(ratio, 3), "ratio", 1 / 3))
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
