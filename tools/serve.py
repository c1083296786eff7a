"""Serves a model on the Triton server, in the foreground, until Ctrl-C.

    python -m tools.serve --model DIR --prefill-devices cuda:0 --decode-devices cuda:1
    python -m tools.serve DIR --mode colocated --devices cuda:0,cuda:1
    python -m tools.serve DIR --prefill "tp=2" --decode "tp=1,pp=2,replicas=2"

`make serve` passes its variables (MODEL, HTTP_PORT, ...) through the environment.
"""

import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Annotated, NoReturn

from rich.console import Console
from typer import Argument, Option

from ensemble.config import StageName
from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from ensemble.openai_front import API_KEY_VARIABLE
from ensemble.serving.control import ControlError, call
from ensemble.serving.fleet_table import FleetTable, ListFleet
from tools.command_line import allow_interrupt, run
from tools.installation.cache import cache_dir
from tools.installation.server_files import ServerError
from tools.server.degrees import DISTSERVE_FLAGS, parse_degrees, rank_map
from tools.server.deployment import make_deployment
from tools.server.ports import Ports
from tools.server.triton_server import MAX_BODY_BYTES, TritonServer

CURL = """curl -s {url}/v2/models/ensemble/generate \
-d '{{"text_input": "The capital of France is", "max_tokens": 16, "temperature": 0}}'"""
OPENAI_CURL = """curl -s {url}/completions {key}\
-d '{{"model": "{name}", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}}'"""
MAX_RESTARTS, RESTARTS_WITHIN_S = 5, 600.0
DEVICES = "of each rank of each replica, such as cuda:0,cuda:1 or cpu"
DEGREES = "ranks of a replica, layers of its places, replicas: tp=2,pp=2,layers=21+19,replicas=2"


def main(
    served: Annotated[Path | None, Argument(metavar="MODEL", help="as --model, which it overrides")] = None,
    model: Annotated[Path | None, Option(envvar="MODEL", help="directory or Hub name; none: SmolLM2-135M")] = None,
    deployment: Annotated[
        Path | None, Option(envvar="DEPLOYMENT", help="deployment file (YAML), which the other flags override")
    ] = None,
    served_model_name: Annotated[str | None, Option(help="what clients and metrics call it")] = None,
    load_format: Annotated[str | None, Option(help="auto, or dummy for random weights")] = None,
    dtype: Annotated[str | None, Option(help="auto, float16, bfloat16, float32 or float64")] = None,
    max_model_len: Annotated[int | None, Option(help="tokens of a sequence, prompt and output")] = None,
    mode: Annotated[str | None, Option(envvar="MODE", help="disaggregated, or colocated: no prefill replicas")] = None,
    devices: Annotated[str | None, Option(envvar="DEVICES", help=f"colocated: {DEVICES}")] = None,
    launcher: Annotated[
        str | None,
        Option(envvar="LAUNCHER", help="of the workers: local or ray (RAY_ADDRESS; unset: a cluster here)"),
    ] = None,
    prefill_devices: Annotated[str | None, Option(envvar="PREFILL_DEVICES", help=DEVICES)] = None,
    decode_devices: Annotated[str | None, Option(envvar="DECODE_DEVICES", help=DEVICES)] = None,
    prefill: Annotated[str | None, Option(envvar="PREFILL", help=f"prefill's {DEGREES}")] = None,
    decode: Annotated[str | None, Option(envvar="DECODE", help=f"decode's {DEGREES}")] = None,
    block_size: Annotated[int | None, Option(help="tokens of a KV block")] = None,
    kv_cache_bytes: Annotated[int | None, Option(help="of each worker")] = None,
    gpu_memory_utilization: Annotated[float | None, Option(help="share of its device, for each worker")] = None,
    max_num_batched_tokens: Annotated[int | None, Option(help="token budget of a prefill batch")] = None,
    max_num_seqs: Annotated[int | None, Option(help="sequences in a batch")] = None,
    enable_prefix_caching: Annotated[
        bool | None, Option(help="every replica keeps the KV of what has ended, for prompts that begin alike")
    ] = None,
    roles: Annotated[
        str | None, Option(help="fixed, or auto: chosen by predicted times, the default with two GPUs and more")
    ] = None,
    ttft_target_ms: Annotated[float | None, Option(help="time to the first token, of requests that name none")] = None,
    itl_target_ms: Annotated[float | None, Option(help="time between tokens, which prompts beside them leave")] = None,
    tpot_target_ms: Annotated[float | None, Option(help="mean time per output token")] = None,
    on_missed_target: Annotated[str | None, Option(help="serve late, or refuse what is predicted to miss")] = None,
    prefill_policy: Annotated[str | None, Option(help="fcfs, sjf, priority, edf or fair")] = None,
    decode_policy: Annotated[str | None, Option(help="fcfs, srpt, priority, mlfq or sj-mlfq")] = None,
    swap_space: Annotated[
        float | None, Option(help="GiB of host memory for swapped KV, of each decode replica")
    ] = None,
    max_num_resident_seqs: Annotated[int | None, Option(help="of a decode replica: running, waiting, swapped")] = None,
    decode_admission: Annotated[
        str | None, Option(help="by the length that outputs had lately, or may have: optimistic or reserved")
    ] = None,
    first_token: Annotated[
        str | None, Option(help="held until the sequence has joined decode: no stall after it; or at_once")
    ] = None,
    batching: Annotated[str | None, Option(help="of prompts computed in decode: mixed or prefill-first")] = None,
    local_prefill_tokens: Annotated[
        int | None, Option(help="prompt tokens in a step with running sequences; colocated: 1024, in decode: none")
    ] = None,
    transfer_transport: Annotated[
        str | None, Option(help="of KV between replicas: auto, cuda_ipc, host (memory) or nccl")
    ] = None,
    host: Annotated[str, Option(envvar="HOST", help="address to listen on; 0.0.0.0: all, ::: IPv6 too")] = "127.0.0.1",
    http_port: Annotated[int, Option(envvar="HTTP_PORT", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, Option(envvar="GRPC_PORT", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, Option(envvar="METRICS_PORT", min=1, max=65535)] = 8002,
    openai_port: Annotated[int, Option(envvar="OPENAI_PORT", min=1, max=65535)] = 9000,
    openai: Annotated[bool, Option(help="serve OpenAI's API")] = True,
    api_key: Annotated[
        str | None,
        Option(envvar=API_KEY_VARIABLE, help="for clients of OpenAI's API; none: they need none"),
    ] = None,
    allowed_origins: Annotated[
        str, Option(help="of web pages that may call OpenAI's API, such as https://chat.example.org; *: all")
    ] = "",
    page: Annotated[bool, Option(help="serve a page for browsers beside it: chat, and the server as it is now")] = True,
    http_relay: Annotated[bool, Option(help="cancel requests whose HTTP client goes away")] = True,
    max_body_bytes: Annotated[int, Option(min=1, help="of an HTTP request")] = MAX_BODY_BYTES,
    allow_client_shm: Annotated[
        bool, Option("--allow-client-shm", help="let clients register shared memory with the server")
    ] = False,
    restart: Annotated[
        bool, Option(help=f"start a server that ends or hangs again, {MAX_RESTARTS} times in 10 minutes")
    ] = True,
    drain_timeout: Annotated[
        float, Option(min=0, help="seconds for running requests to end when the server is to stop")
    ] = 30.0,
    otlp_endpoint: Annotated[
        str | None,
        Option(envvar="OTLP_ENDPOINT", help="OpenTelemetry collector of spans, such as http://localhost:4318"),
    ] = None,
    log: Annotated[Path | None, Option(help="file for the server's log; none: one in the user's cache")] = None,
) -> None:
    """Serves a model, prefill and decode apart, until Ctrl-C."""
    if devices and mode != "colocated":
        raise ConfigError(f"devices = {devices}: for mode = colocated; else --prefill-devices and --decode-devices")
    decode_devices = devices or decode_devices
    model = served or model
    fields: dict[str, object] = {
        "mode": mode,
        "launcher": launcher,
        "model.path": model,
        "model.served_name": served_model_name,
        "model.load_format": load_format,
        "model.dtype": dtype,
        "model.max_model_len": max_model_len,
        "prefill.devices": prefill_devices and prefill_devices.split(","),
        "decode.devices": decode_devices and decode_devices.split(","),
        "prefill.max_num_batched_tokens": max_num_batched_tokens,
        "prefill.prefix_cache": enable_prefix_caching,
        "scheduler.policy": prefill_policy,
        "scheduler.roles": roles,
        "scheduler.ttft_target_ms": ttft_target_ms,
        "scheduler.itl_target_ms": itl_target_ms,
        "scheduler.tpot_target_ms": tpot_target_ms,
        "scheduler.on_missed_target": on_missed_target,
        "scheduler.first_token": first_token,
        "decode.policy": decode_policy,
        "decode.admission": decode_admission,
        "decode.host_kv_bytes": swap_space and int(swap_space * 2**30),
        "decode.max_num_resident_seqs": max_num_resident_seqs,
        "decode.batching": batching,
        "decode.local_prefill_tokens": local_prefill_tokens,
        "transfer.transport": transfer_transport,
        "block_size": block_size,
        "otlp_endpoint": otlp_endpoint,
    }
    for stage in ("prefill", "decode"):
        fields[f"{stage}.kv_cache_bytes"] = kv_cache_bytes
        fields[f"{stage}.gpu_memory_utilization"] = gpu_memory_utilization
        fields[f"{stage}.max_num_seqs"] = max_num_seqs
    num_replicas: dict[StageName, int] = {}
    sides: list[tuple[StageName, str | None]] = [("prefill", prefill), ("decode", decode)]
    for side, words in sides:
        degrees = parse_degrees(side, words or "")
        if "replicas" in degrees:
            num_replicas[side] = degrees.pop("replicas")
        fields |= {f"{side}.{field}": degree for field, degree in degrees.items()}
    server = TritonServer(
        make_deployment(fields, deployment, num_replicas),
        ports=Ports(http_port, grpc_port, metrics_port),
        host=host,
        log_path=log or cache_dir() / f"server-{http_port}.log",
        openai_port=openai_port if openai else None,
        page=page,
        api_key=api_key,
        allowed_origins=[origin for origin in allowed_origins.split(",") if origin],
        http_relay=http_relay,
        max_body_bytes=max_body_bytes,
        allow_client_shm=allow_client_shm,
    )
    console = Console(stderr=True, highlight=False)
    with server:
        start(server, console)
        show_ranks(server, console)
        print(f"HTTP     {server.http_url}")
        print(f"gRPC     {server.grpc_url}")
        print(f"metrics  {server.metrics_url}")
        print(f"log      {server.log_path}")
        if openai:
            print(f"OpenAI   {server.openai_url}")
            if page:
                print(f"page     {server.page_url}")
        print(f"\n{CURL.format(url=server.http_url)}")
        if openai:
            key = f'-H "Authorization: Bearer ${API_KEY_VARIABLE}" ' if api_key else ""
            print(OPENAI_CURL.format(url=server.openai_url, name=server.deployment.model.name, key=key))
        print(flush=True)
        console.print("Ready. Ctrl-C stops the server.")
        try:
            keep_serving(server, console, MAX_RESTARTS if restart else 0)
        except KeyboardInterrupt:
            console.print(f"Stopping; what runs has {drain_timeout:.0f} s to end. Ctrl-C again: now.")
            with contextlib.suppress(KeyboardInterrupt):
                allow_interrupt()
                server.drain(drain_timeout)


def keep_serving(server: TritonServer, console: Console, max_restarts: int) -> NoReturn:
    """Starts the server again whenever it ends or hangs. Raises ServerError if it has done so too often."""
    restarted_at: deque[float] = deque()
    reason = server.wait()
    while True:
        now = time.monotonic()
        while restarted_at and restarted_at[0] < now - RESTARTS_WITHIN_S:
            restarted_at.popleft()
        if len(restarted_at) >= max_restarts:
            raise ServerError(f"{reason} (after {len(restarted_at)} restarts in {RESTARTS_WITHIN_S / 60:.0f} minutes)")
        restarted_at.append(now)
        console.print(
            f"{reason}; starting it again ({len(restarted_at)} of {max_restarts})", markup=False, soft_wrap=True
        )
        server.restart()
        try:
            server.wait_ready()
        except ServerError as error:
            reason = str(error)
            continue
        console.print(f"Ready again after {time.monotonic() - now:.1f} s")
        reason = server.wait()


def start(server: TritonServer, console: Console) -> None:
    """Waits until a started server is ready, showing what it loads. Raises ServerError."""
    model = server.deployment.model.name
    prefill, decode = (" ".join(stage.replicas) for stage in (server.deployment.prefill, server.deployment.decode))
    where = f"prefill on {prefill}, decode on {decode}" if prefill else f"colocated on {decode}"
    console.print(f"Loading {model} ({where})")
    with console.status("Waiting for the Triton server"):
        server.wait_ready(lambda line: console.print(f"  {line}", markup=False))


def show_ranks(server: TritonServer, console: Console) -> None:
    """Which rank of which replica runs where, with how much KV, if a replica has several."""
    deployment = server.deployment
    if deployment.prefill.num_ranks == deployment.decode.num_ranks == 1:
        return
    try:
        fleet = call(server.run_dir, ListFleet(), FleetTable, timeout_s=10.0)
    except ControlError as error:  # the scheduler has ended since, and will be started again
        console.print(f"  No map of the ranks: {error}", markup=False, soft_wrap=True)
        return
    num_blocks = {each.replica: each.num_blocks for each in fleet.replicas}
    for line in rank_map(deployment, load_model_spec(deployment.model.path), num_blocks):
        console.print(f"  {line}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(main, foreign_options=DISTSERVE_FLAGS)
