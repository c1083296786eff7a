"""One process of the client: it sends its share of the requests by the schedule, and notes what comes when."""

import asyncio
import gc
import signal
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import grpc
import grpc.aio
import msgspec
from tritonclient.grpc import service_pb2

from ensemble.errors import DistServeError
from tools.load.records import Record

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
CONNECT_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.02  # the event loop's own lateness
TIMELINE = ("arrival", "first_scheduled", "first_token", "decode_submitted", "decode_joined", "last_token")


class LoadError(DistServeError):
    """The load could not be put on the server."""


class Prepared(NamedTuple):
    """A request that only has to be sent."""

    due: float  # seconds from the start
    body: bytes  # ModelInferRequest
    prompt_len: int
    output_len: int


class Job(NamedTuple):
    """What one process is to do."""

    url: str
    warmups: list[Prepared]
    requests: list[Prepared]
    max_concurrency: int | None
    timeout_s: float
    connect_timeout_s: float
    keep_text: bool


class Part(msgspec.Struct):
    """What one process saw."""

    records: list[Record]
    lags: list[float]
    cpu_s: float
    wall_s: float


def main(descriptor: int) -> None:
    """What the pipe there says, which is a Job first."""
    pipe = Connection(descriptor)
    job: Job = pipe.recv()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        part = asyncio.run(_drive(pipe, job))
    except (TimeoutError, asyncio.TimeoutError):
        pipe.send(f"{job.url}: no server answers")
    except LoadError as error:
        pipe.send(str(error))
    else:
        pipe.send(msgspec.msgpack.encode(part))


async def _drive(pipe: Connection, job: Job) -> Part:
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
        return Part(records, lags, time.process_time() - cpu_s, time.monotonic() - start)


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
