"""An open-loop client: requests leave by the schedule, whatever the server does, each on a gRPC stream of its own.

Several processes share the schedule. How late each sends, and how late its event loop wakes, is measured: a client that
is the bottleneck measures itself.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from tools.load.client_process import CONNECT_TIMEOUT_S, Job, LoadError, Part, Prepared
from tools.load.records import Record

ROOT = Path(__file__).resolve().parents[2]
DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32", "bool": "BOOL"}
HEAD_START_S = 0.1  # from the start signal to time 0


@dataclass(frozen=True, slots=True)
class Outcome:
    records: list[Record]
    lags: list[float]  # seconds by which sends and looks were late
    cpu_share: float  # of the cores that the processes had


def prepare(
    model: str, prompt: str | npt.NDArray[np.int32], output_len: int, due: float, prompt_len: int, **inputs: Any
) -> Prepared:
    """A streamed, greedy request for exactly so many tokens. `inputs`: scalars beside these.

    prompt: token ids [prompt_len] for `scheduler`, text for any model.
    """
    shape = [1] if model == "scheduler" else [1, 1]
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True

    def add(name: str, datatype: str, dims: Sequence[int], raw: bytes) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=dims)
        request.raw_input_contents.append(raw)

    if isinstance(prompt, str):
        text = prompt.encode()
        add("text_input", "BYTES", shape, len(text).to_bytes(4, "little") + text)
    else:
        add("input_ids", "INT32", [len(prompt)], prompt.astype(np.int32).tobytes())
    exact: dict[str, Any] = {"max_tokens": np.int32(output_len), "min_tokens": np.int32(output_len)}
    exact |= {"ignore_eos": True, "temperature": np.float32(0), "stream": True}
    exact |= {"return_num_output_tokens": True, "return_perf_metrics": True}
    for name, value in {**exact, **inputs}.items():
        array = np.asarray(value)
        add(name, DATATYPES[array.dtype.name], shape, array.tobytes())
    return Prepared(due, request.SerializeToString(), prompt_len, output_len)


def drive(
    url: str,
    requests: Sequence[Prepared],
    *,
    num_processes: int,
    max_concurrency: int | None = None,
    timeout_s: float = 600.0,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    num_warmups: int = 0,
    keep_text: bool = False,
    on_done: Callable[[int], None] = lambda number: None,
) -> Outcome:
    """Sends every request once and waits for all. `on_done` is told how many have ended. Raises LoadError.

    max_concurrency: requests in flight; the others wait, so that the load is no longer open.
    timeout_s: of a request, which is an error after that.
    num_warmups: of the requests are sent before, all at once; they do not count, but one that fails is a LoadError.
    """
    num_processes = max(1, min(num_processes, len(requests), max_concurrency or len(requests)))
    pipes: list[Connection] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(num_processes):
            process, pipe = _start()
            processes.append(process)
            pipes.append(pipe)
        for index, pipe in enumerate(pipes):
            job = Job(
                url,
                list(requests[:num_warmups]) if index == 0 else [],
                list(requests[index::num_processes]),
                None if max_concurrency is None else (max_concurrency + index) // num_processes,
                timeout_s,
                connect_timeout_s,
                keep_text,
            )
            with contextlib.suppress(BrokenPipeError):  # it has ended: told below
                pipe.send(job)
        for pipe in pipes:
            answer = _receive(pipe, url)
            if answer != "ready":
                raise LoadError(str(answer))
        start = time.monotonic() + HEAD_START_S
        for pipe in pipes:
            pipe.send(start)
        parts = list(_gather(pipes, url, on_done))
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    cores = min(num_processes, os.cpu_count() or 1)
    wall_s = max(part.wall_s for part in parts)
    return Outcome(
        sorted((record for part in parts for record in part.records), key=lambda record: record.due),
        [lag for part in parts for lag in part.lags],
        sum(part.cpu_s for part in parts) / (wall_s * cores),
    )


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    """Not by multiprocessing, whose processes import what this one was started with: torch, for seconds."""
    ours, theirs = multiprocessing.Pipe()
    code = f"from tools.load.client_process import main; main({theirs.fileno()})"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[theirs.fileno()])
    return process, ours


def _receive(pipe: Connection, url: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise LoadError(f"{url}: a process of the client has ended") from None


def _gather(pipes: list[Connection], url: str, on_done: Callable[[int], None]) -> Iterator[Part]:
    num_done, left = dict.fromkeys(pipes, 0), set(pipes)
    while left:
        for pipe in wait(list(left)):
            assert isinstance(pipe, Connection)
            message = _receive(pipe, url)
            if isinstance(message, bytes):
                left.remove(pipe)
                yield msgspec.msgpack.decode(message, type=Part)
            else:
                num_done[pipe] = message
                on_done(sum(num_done.values()))
