"""Texts of 5, 20 and 60 MB beside small requests at 2 a second, on the CPU.

    python -m tools.proofs.huge_texts --output docs/results/huge-texts.json

Over gRPC, which takes texts of any size, to both fronts by turns, and to a model that is not there: the time until a
refusal has the sending in it, which is most of it.
"""

import re
import statistics
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tritonclient.grpc as grpc
import typer
from tritonclient.utils import InferenceServerException

from tools.benchmarks.results import at_most, report
from tools.proofs.grpc_request import Inputs, make_tensors
from tools.server.server_state import processes
from tools.server.tiny_server import tiny_server
from tools.server.triton_server import TritonServer

SIZES_MB = (5, 20, 60)
REFUSED_GOAL_S, TTFT_GOAL, MEMORY_GOAL_MB = 0.2, 1.2, 100.0
INTERVAL_S, PHASE_S, SETTLE_S = 0.5, 20.0, 10.0
UNKNOWN = "unknown"
TOO_LONG = "length of text_input|Failed to increase the shared memory"  # ours, and the Triton server's own
WHY = {"ensemble": TOO_LONG, UNKNOWN: "unknown model", "scheduler": TOO_LONG}  # model |-> what the refusal says


def request_s(url: str, model: str, inputs: Inputs) -> tuple[float, str | None]:
    """From the message's handing over to gRPC to the first response or the error, on a stream of its own."""
    answered = threading.Event()
    errors: list[str] = []

    def receive(result: Any, error: InferenceServerException | None) -> None:
        if error is not None:
            errors.append(str(error))
        answered.set()

    tensors = make_tensors(inputs)
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(receive)
        started = time.monotonic()
        client.async_stream_infer(model, tensors)
        if not answered.wait(60):
            raise TimeoutError("no answer within 60 s")
        seconds = time.monotonic() - started
        client.stop_stream()
    return seconds, errors[0] if errors else None


def shaped(model: str, inputs: Inputs) -> Inputs:
    return {name: array[np.newaxis] for name, array in inputs.items()} if model == "ensemble" else inputs


def text(value: bytes) -> np.ndarray[Any, Any]:
    return np.array([value], dtype=object)


def small_ttfts(server: TritonServer, seconds: float) -> list[float]:
    """Of requests at 2 a second."""
    inputs = {"text_input": text(b"The capital"), "max_tokens": np.array([4], np.int32), "stream": np.ones(1, bool)}
    found, end = [], time.monotonic() + seconds
    while (started := time.monotonic()) < end:
        ttft_s, error = request_s(server.grpc_url, "ensemble", shaped("ensemble", inputs))
        assert error is None, error
        found.append(ttft_s)
        time.sleep(max(0.0, started + INTERVAL_S - time.monotonic()))
    return found


def refusals(server: TritonServer, done: threading.Event) -> dict[tuple[int, bool], list[float]]:
    """(megabytes, whether the model is there) |-> seconds until a text of that size was sent and refused."""
    found: dict[tuple[int, bool], list[float]] = {(size, known): [] for size in SIZES_MB for known in (True, False)}
    while not done.is_set():
        for size in SIZES_MB:
            for model, why in WHY.items():
                if done.is_set():
                    return found
                inputs = {"text_input": text(b"x" * (size * 1_000_000)), "max_tokens": np.array([4], np.int32)}
                seconds, error = request_s(server.grpc_url, model, shaped(model, inputs))
                assert error is not None and re.search(why, error), error
                found[size, model != UNKNOWN].append(seconds)
                done.wait(INTERVAL_S)
    return found


def memory_mb(server: TritonServer) -> float:
    """Of all processes, what they share counted once."""
    total = 0
    for process in processes(server):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None) -> None:
    """Exit status 1 if a goal was missed."""
    with tiny_server() as server:
        small_ttfts(server, 3.0)
        alone, memory_before = small_ttfts(server, PHASE_S), memory_mb(server)
        done = threading.Event()
        found: dict[tuple[int, bool], list[float]] = {}
        thread = threading.Thread(target=lambda: found.update(refusals(server, done)))
        thread.start()
        beside = small_ttfts(server, PHASE_S)
        done.set()
        thread.join()
        time.sleep(SETTLE_S)
        kept_mb = memory_mb(server) - memory_before
    rows: list[dict[str, Any]] = []
    for (size, known), seconds in found.items():
        median = round(statistics.median(seconds), 3)
        if known:
            rows.append(at_most(f"{size} MB: sent and refused, median", median, "s", REFUSED_GOAL_S))
        else:
            rows.append({"name": f"{size} MB: sent to a model that is not there, median", "value": median, "unit": "s"})
    ratio = statistics.median(beside) / statistics.median(alone)
    rows += [
        {
            "name": "TTFT of small requests alone, median",
            "value": round(statistics.median(alone) * 1e3, 1),
            "unit": "ms",
        },
        {"name": "beside huge texts, median", "value": round(statistics.median(beside) * 1e3, 1), "unit": "ms"},
        {"name": "beside huge texts, longest", "value": round(max(beside) * 1e3, 1), "unit": "ms"},
        at_most("median beside huge texts, over alone", round(ratio, 2), "", TTFT_GOAL),
        at_most("memory kept", round(kept_mb, 1), "MB", MEMORY_GOAL_MB),
    ]
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
