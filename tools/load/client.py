"""An open-loop client: requests leave by the schedule, whatever the server does, each on a gRPC stream of its own.

Several processes share the schedule. How late each sends, and how late its event loop wakes, is measured: a client that
is the bottleneck measures itself.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import grpc
import grpc.aio
import msgspec
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from ensemble.errors import DistServeError
from tools.load.records import Record

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32", "bool": "BOOL"}
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
CONNECT_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.02  # the event loop's own lateness
HEAD_START_S = 0.1  # from the start signal to time 0
TIMELINE = ("arrival", "first_scheduled", "first_token", "decode_submitted", "decode_joined", "last_token")


class LoadError(DistServeError):
    """The load could not be put on the server."""


class Prepared(NamedTuple):
    """A request that only has to be sent."""

    due: float  # seconds from the start
    body: bytes  # ModelInferRequest
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Outcome:
    records: list[Record]
    lags: list[float]  # seconds by which sends and looks were late
    cpu_share: float  # of the cores that the processes had


class _Job(NamedTuple):
    """What one process is to do."""

    url: str
    warmups: list[Prepared]
    requests: list[Prepared]
    max_concurrency: int | None
    timeout_s: float
    connect_timeout_s: float
    keep_text: bool


class _Part(msgspec.Struct):
    """What one process saw."""

    records: list[Record]
    lags: list[float]
    cpu_s: float
    wall_s: float


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
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for index in range(num_processes):
            ours, theirs = context.Pipe()
            job = _Job(
                url,
                list(requests[:num_warmups]) if index == 0 else [],
                list(requests[index::num_processes]),
                None if max_concurrency is None else (max_concurrency + index) // num_processes,
                timeout_s,
                connect_timeout_s,
                keep_text,
            )
            process = context.Process(target=_client, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
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
            process.join()
    cores = min(num_processes, os.cpu_count() or 1)
    wall_s = max(part.wall_s for part in parts)
    return Outcome(
        sorted((record for part in parts for record in part.records), key=lambda record: record.due),
        [lag for part in parts for lag in part.lags],
        sum(part.cpu_s for part in parts) / (wall_s * cores),
    )


def _receive(pipe: Connection, url: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise LoadError(f"{url}: a process of the client has ended") from None


def _gather(pipes: list[Connection], url: str, on_done: Callable[[int], None]) -> Iterator[_Part]:
    num_done, left = dict.fromkeys(pipes, 0), set(pipes)
    while left:
        for pipe in wait(list(left)):
            assert isinstance(pipe, Connection)
            message = _receive(pipe, url)
            if isinstance(message, bytes):
                left.remove(pipe)
                yield msgspec.msgpack.decode(message, type=_Part)
            else:
                num_done[pipe] = message
                on_done(sum(num_done.values()))


# ---- one process


def _client(pipe: Connection, job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        part = asyncio.run(_drive(pipe, job))
    except (TimeoutError, asyncio.TimeoutError):
        pipe.send(f"{job.url}: no server answers")
    except LoadError as error:
        pipe.send(str(error))
    else:
        pipe.send(msgspec.msgpack.encode(part))


async def _drive(pipe: Connection, job: _Job) -> _Part:
    requests, max_concurrency, timeout_s = job.requests, job.max_concurrency, job.timeout_s
    async with grpc.aio.insecure_channel(job.url, options=CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), job.connect_timeout_s)
        method = channel.stream_stream(STREAM)  # bytes: the time is taken before they are parsed
        await asyncio.gather(*(_warm_up(job.url, method(), request, timeout_s) for request in job.warmups))
        gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
        records: list[Record] = []
        lags: list[float] = []
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause would be taken for the server's
        pipe.send("ready")
        start = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

        async def send(request: Prepared) -> None:
            async with gate:
                now = time.monotonic() - start
                is_open = max_concurrency is None
                if is_open:
                    lags.append(now - request.due)
                record = Record(
                    prompt_len=request.prompt_len,
                    output_len=request.output_len,
                    due=request.due if is_open else max(now, request.due),
                    sent=now,
                )
                try:
                    await asyncio.wait_for(_stream(method(), request.body, record, start, job.keep_text), timeout_s)
                except (TimeoutError, asyncio.TimeoutError):
                    record.error = f"no end after {timeout_s:g} s"
                except grpc.aio.AioRpcError as error:
                    record.error = f"{error.code().name}: {error.details()}"
                records.append(record)

        watch = asyncio.create_task(_watch(pipe, records, lags))
        cpu_s = time.process_time()
        tasks = []
        for request in requests:
            delay = start + request.due - time.monotonic()
            await asyncio.sleep(max(0.0, delay))
            tasks.append(asyncio.create_task(send(request)))
        await asyncio.gather(*tasks)
        watch.cancel()
        return _Part(records, lags, time.process_time() - cpu_s, time.monotonic() - start)


async def _warm_up(url: str, call: Any, request: Prepared, timeout_s: float) -> None:
    record = Record(prompt_len=request.prompt_len, output_len=request.output_len, due=0.0, sent=0.0)
    try:
        await asyncio.wait_for(_stream(call, request.body, record, 0.0, False), timeout_s)
    except grpc.aio.AioRpcError as error:
        record.error = f"{error.code().name}: {error.details()}"
    if record.error:
        raise LoadError(f"the first request to {url} failed: {record.error}")


async def _watch(pipe: Connection, records: list[Record], lags: list[float]) -> None:
    told = 0
    while True:
        expected = time.monotonic() + LOOK_EVERY_S
        await asyncio.sleep(LOOK_EVERY_S)
        lags.append(max(0.0, time.monotonic() - expected))
        if len(records) > told:
            told = len(records)
            pipe.send(told)


async def _stream(call: Any, body: bytes, record: Record, start: float, keep_text: bool) -> None:
    await call.write(body)
    await call.done_writing()
    async for raw in call:  # to its end also after an error: what is cancelled there may crash the 24.10 server
        now = time.monotonic() - start
        message = service_pb2.ModelStreamInferResponse.FromString(raw)
        if message.error_message:
            record.error = message.error_message
            continue
        response = message.infer_response
        if response.outputs:
            outputs = {
                output.name: content
                for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
            }
            num_tokens = int.from_bytes(outputs["num_output_tokens"], "little")
            if num_tokens:
                record.times.append(now)
                record.tokens.append(num_tokens)
            if keep_text:
                record.text += outputs["text_output"][4:].decode()
            if "last_token_time_ns" in outputs:
                record.phases = phases(
                    {name: int.from_bytes(outputs[f"{name}_time_ns"], "little") for name in TIMELINE}
                )
        if response.parameters["triton_final_response"].bool_param:
            return


def phases(at_ns: Mapping[str, int]) -> dict[str, float]:
    """Seconds in each phase of the server's timeline; without a hand-off there is neither bridge nor hand-off."""
    found = {
        "queue": at_ns["first_scheduled"] - at_ns["arrival"],
        "prefill": at_ns["first_token"] - at_ns["first_scheduled"],
    }
    if at_ns["decode_submitted"]:
        found["bridge"] = at_ns["decode_submitted"] - at_ns["first_token"]
        found["handoff"] = at_ns["decode_joined"] - at_ns["decode_submitted"]
    found["decode"] = at_ns["last_token"] - (at_ns["decode_joined"] or at_ns["first_token"])
    return {name: max(0, ns) / 1e9 for name, ns in found.items()}
