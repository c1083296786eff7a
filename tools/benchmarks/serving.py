"""What clients of the server see under given loads: first tokens, gaps, tokens a second, through `ensemble`.

    python -m tools.benchmarks.serving --devices cuda:0,cuda:1 --output docs/results/serving.json

chat          OPT-13B on every device for itself (colocated), 11 requests/s
summary       LLaMA-2-13B likewise, with chunks of 256 beside running sequences, 12 requests/s
held          summaries, prefill apart from decode, 8 requests/s: first tokens held until decode has joined, and at once
overload      chat, prefill apart from decode, 14 requests/s, which is more than that pair can do
long-answers  chat likewise, where it can: answers that end by themselves, with max_tokens 1,024 and with the exact one
streams       LLaMA-2-7B on one device, 256 streams: `ensemble` beside `scheduler`, and that beside tools.offline

`--chunk` bounds a prompt's tokens in a step beside running sequences, of chat and streams. Weights are random: every
request says how long its answer is. `--devices cpu,cpu` runs the same with a tiny model.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tritonclient.grpc import service_pb2
from typer import Option

from ensemble.engine.engine import load_engine
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams
from ensemble.tokenizer import Tokenizer
from tools.bench_goodput import deployment_of
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.results import at_least, at_most
from tools.command_line import run
from tools.load.client_process import Prepared
from tools.load.load import Load, put
from tools.load.prompts import token_ids
from tools.load.records import Record, Run, describe
from tools.load.summary import values_ms
from tools.load.workloads import Workload
from tools.offline import generate
from tools.proofs.gpu_smoke import READY_TIMEOUT_S, free_memory, write_model_dir
from tools.proofs.sections import Row, Section, run_sections
from tools.server.tiny_server import TINY_MODEL
from tools.server.triton_server import TritonServer

CHAT_TARGETS_MS = {"ttft": 250.0, "tpot": 40.0}
LONGEST_ANSWER = 1024  # tokens: the max_tokens of clients who do not know how long an answer will be
LONG_ANSWERS_RATE = 7.7  # 0.8 of what prefill and decode apart can do, on two H100
LONG_ANSWERS_KV_BYTES = 32 << 30  # of a replica: 39 sequences of 759 tokens and LONGEST_ANSWER, of 13B in 16 bits less
END_ID, END_BIAS = 2, 100  # the token that ends such an answer; to its logit: sampled as soon as it may be
STREAMS, STREAM_PROMPT, STREAM_OUTPUT, EACH = 256, 128, 200, 4
CPU_SCALE, CPU_RATE, CPU_STREAMS = 0.1, 0.25, 4  # of lengths; of rates
MAX_PROCESSES = 8  # of the client
CPU_STAGE = {"num_threads": 1, "kv_cache_bytes": 32 << 20}


class Bench:
    """Servers and loads of this benchmark, scaled down where there is no GPU."""

    def __init__(
        self, devices: Sequence[str], chat: Workload, summary: Workload, seconds: float, chunk: int | None
    ) -> None:
        self.devices, self.seconds = list(devices), seconds
        self.colocated = "colocated" if chunk is None else f"colocated:{chunk}"
        self.chunk = "" if chunk is None else f", chunk {chunk}"
        self.on_gpus = devices[0] != "cpu"
        scale = 1.0 if self.on_gpus else CPU_SCALE
        self.chat, self.summary = replace(chat, scale=scale), replace(summary, scale=scale)

    @contextmanager
    def server(
        self, folder: Path, log: Path, shape: str, mode: str, devices: Sequence[str], **fields: Any
    ) -> Iterator[TritonServer]:
        model = folder / shape
        if not model.exists():
            write_model_dir(model, SHAPES[shape].config if self.on_gpus else TINY_MODEL)
        common: dict[str, Any] = {"model.path": model, "model.load_format": "dummy"}
        common["model.dtype"] = "float16" if self.on_gpus else "float32"
        common |= fields
        if not self.on_gpus:
            common |= {f"{side}.{name}": value for side in ("prefill", "decode") for name, value in CPU_STAGE.items()}
        with TritonServer(deployment_of(mode, ",".join(devices), common), log_path=log) as server:
            server.wait_ready(timeout_s=READY_TIMEOUT_S)
            yield server

    def open_load(self, server: TritonServer, workload: Workload, rate: float) -> Run:
        rate = rate if self.on_gpus else CPU_RATE * rate
        load = Load(workload, max(1, round(rate * self.seconds)), rate, endpoint="ensemble")
        return put_warm(server, load)

    # ---- the parts

    def chat_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        with self.server(folder, logs / "chat.log", "OPT-13B", self.colocated, self.devices) as server:
            served = self.open_load(server, self.chat, 11)
        goals = {"TPOT, P50": 20.0, "ITL P99 of a request, P50": 44.0}
        yield from rows_of(f"OPT-13B, chat, colocated{self.chunk}, 11/s", served, goals)

    def summary_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        with self.server(folder, logs / "summary.log", "LLaMA-2-13B", "colocated:256", self.devices) as server:
            served = self.open_load(server, self.summary, 12)
        goals = {"TPOT, P90": 15.5, "ITL P99 of a request, P99": 20.0}
        yield from rows_of("LLaMA-2-13B, summary, colocated, chunk 256, 12/s", served, goals)

    def held_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        name = "LLaMA-2-13B, summary, disaggregated, 8/s"
        runs = {}
        for when in ("held", "at_once"):
            fields = {"scheduler.first_token": when}
            log = logs / f"{when}.log"
            with self.server(folder, log, "LLaMA-2-13B", "disaggregated", self.devices, **fields) as server:
                runs[when] = self.open_load(server, self.summary, 8)
            yield from rows_of(f"{name}, first token {when}", runs[when], {})
        step_ms = float(np.median(values_ms(runs["held"].records, "itl")))
        longest_ms = float(np.percentile(values_ms(runs["held"].records, "gap"), 90))
        yield at_most(
            f"{name}, held: longest gap of a request, P90, over the median gap", round(longest_ms / step_ms, 3), "", 1.2
        )
        medians = [float(np.median(values_ms(runs[when].records, "ttft"))) for when in ("held", "at_once")]
        yield at_most(f"{name}: TTFT P50, held after at_once", round(medians[0] - medians[1], 2), "ms", 25.0)

    def overload_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        with self.server(folder, logs / "overload.log", "OPT-13B", "disaggregated", self.devices) as server:
            served = self.open_load(server, self.chat, 14)
        goals = {"TPOT, P99": 32.0, "longest gap of a request, P99": 100.0}
        yield from rows_of("OPT-13B, chat, disaggregated, 14/s", served, goals)

    def long_answer_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        # Both loads have the same prompts: the second would find them cached.
        fields = {"decode.kv_cache_bytes": LONG_ANSWERS_KV_BYTES, "prefill.prefix_cache": False}
        found = {}
        with self.server(folder, logs / "long.log", "OPT-13B", "disaggregated", self.devices, **fields) as server:
            rate = LONG_ANSWERS_RATE if self.on_gpus else CPU_RATE * LONG_ANSWERS_RATE
            load = Load(self.chat, max(1, round(rate * self.seconds)), rate, endpoint="scheduler")
            for name, longest in (("exact max_tokens", None), (f"max_tokens {LONGEST_ANSWER}", LONGEST_ANSWER)):
                served = put_warm(server, load, partial(ends_by_itself, longest=longest))
                label = f"OPT-13B, chat, disaggregated, {LONG_ANSWERS_RATE:g}/s, {name}"
                yield from rows_of(label, served, {})
                found[name] = served.attainment(CHAT_TARGETS_MS)
                unit = f"of the requests: {describe(CHAT_TARGETS_MS)}"
                yield {"name": f"{label}: within the targets", "value": round(found[name], 4), "unit": unit}
        exact, longest_share = found.values()
        name = f"OPT-13B, chat, disaggregated: goodput with max_tokens {LONGEST_ANSWER} over exact max_tokens"
        yield at_least(name, round(longest_share / max(exact, 1e-9), 3), "", 0.95)

    def stream_rows(self, folder: Path, logs: Path) -> Iterator[Row]:
        count = STREAMS if self.on_gpus else CPU_STREAMS
        workload = Workload(input_len=STREAM_PROMPT, output_len=STREAM_OUTPUT, scale=1.0 if self.on_gpus else 0.1)
        tokens_per_s: dict[str, float] = {}
        with self.server(folder, logs / "streams.log", "LLaMA-2-7B", self.colocated, self.devices[:1]) as server:
            deployment = server.deployment
            for endpoint in ("ensemble", "scheduler"):
                load = Load(workload, EACH * count, max_concurrency=count, endpoint=endpoint)
                served = put_warm(server, load, num_warmups=count)
                tokens_per_s[endpoint] = sum(each.num_tokens for each in served.records) / served.duration
                goals = {"gap between responses, P99": 100.0} if endpoint == "ensemble" else {}
                yield from rows_of(f"LLaMA-2-7B{self.chunk}, {count} streams by {endpoint}", served, goals)
                label = f"LLaMA-2-7B{self.chunk}, {count} streams by {endpoint}: output"
                yield {"name": label, "value": round(tokens_per_s[endpoint]), "unit": "tokens/s"}
        engine = load_engine(deployment, deployment.decode, torch.device(self.devices[0]))
        rng, vocab_size = random.Random(0), engine.spec.vocab_size
        asked = workload.draw(EACH * count, rng)
        requests = [
            Request(
                request_id=index,
                prompt_token_ids=token_ids(each, vocab_size, rng).tolist(),
                sampling=SamplingParams(max_tokens=each.lengths.output, temperature=0.0, ignore_eos=True),
            )
            for index, each in enumerate(asked)
        ]
        generate(engine, requests[:count], max_num_seqs=count)
        begin = time.perf_counter()
        done = generate(engine, requests, max_num_seqs=count)
        offline = sum(len(each.output_token_ids) for each in done.values()) / (time.perf_counter() - begin)
        del engine
        free_memory()
        yield {
            "name": f"LLaMA-2-7B, {count} at once by tools.offline: output",
            "value": round(offline),
            "unit": "tokens/s",
        }
        yield at_least(
            "`ensemble` over `scheduler`", round(tokens_per_s["ensemble"] / tokens_per_s["scheduler"], 3), "", 0.95
        )
        yield at_least("`scheduler` over tools.offline", round(tokens_per_s["scheduler"] / offline, 3), "", 0.9)


def put_warm(
    server: TritonServer,
    load: Load,
    changed: Callable[[Prepared, int], Prepared] = lambda request, max_model_len: request,
    num_warmups: int = 8,
) -> Run:
    """After others like them, all at once, of which no prompt comes again. Raises LoadError.

    changed: what becomes of each request before it is sent.
    """
    path = server.deployment.model.path
    tokenizer, max_model_len = Tokenizer.from_dir(path), load_model_spec(path).max_model_len
    num_processes = max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) // 2))
    warmups = replace(load, num_prompts=num_warmups, rate=float("inf"), seed=load.seed + 1)
    for each in (warmups, load):
        requests = [changed(request, max_model_len) for request in each.requests(tokenizer, max_model_len)]
        found = put(server.grpc_url, each, requests, num_processes=num_processes)
    return found


def ends_by_itself(request: Prepared, max_model_len: int, *, longest: int | None) -> Prepared:
    """As long as before, but by an end token, which is likeliest from the first place on where it is allowed.

    longest: tokens that it may have; None: as many as it has.
    """
    body = service_pb2.ModelInferRequest.FromString(request.body)
    max_tokens = min(longest or request.output_len, max_model_len - request.prompt_len)
    numbers = {"max_tokens": max(max_tokens, request.output_len), "min_tokens": request.output_len - 1}
    for index, tensor in enumerate(body.inputs):
        if tensor.name in numbers:
            body.raw_input_contents[index] = np.int32(numbers[tensor.name]).tobytes()
        if tensor.name == "ignore_eos":
            body.raw_input_contents[index] = np.bool_(False).tobytes()
    body.parameters["end_id"].int64_param = END_ID
    body.parameters["logit_bias"].string_param = f'{{"{END_ID}": {END_BIAS}}}'
    return request._replace(body=body.SerializeToString())


def rows_of(name: str, found: Run, goals: dict[str, float]) -> Iterator[Row]:
    """goals: at most so many milliseconds, by figure."""
    records = found.completed
    yield at_least(f"{name}: complete", len(records), f"of {len(found.records)} requests", len(found.records))
    yield at_most(f"{name}: the client's own lag, P99", round(found.lag_p99_ms, 2), "ms", found.max_lag_ms)
    values = {metric: values_ms(records, metric) for metric in ("ttft", "tpot", "itl", "gap")}
    figures = {
        **{f"TTFT, P{percent}": (values["ttft"], percent) for percent in (50, 90, 99)},
        **{f"TPOT, P{percent}": (values["tpot"], percent) for percent in (50, 90, 99)},
        "gap between responses, P50": (values["itl"], 50),
        "gap between responses, P99": (values["itl"], 99),
        **{f"ITL P99 of a request, P{percent}": (itl_p99_ms(records), percent) for percent in (50, 90, 99)},
        **{f"longest gap of a request, P{percent}": (values["gap"], percent) for percent in (50, 90, 99)},
    }
    for figure, (of_requests, percent) in figures.items():
        label, value = f"{name}: {figure}", round(float(np.percentile(of_requests, percent)), 2)
        yield (
            at_most(label, value, "ms", goals[figure])
            if figure in goals
            else {"name": label, "value": value, "unit": "ms"}
        )


def itl_p99_ms(records: Sequence[Record]) -> list[float]:
    return [1e3 * float(np.percentile(each.gaps, 99)) for each in records if each.gaps]


def main(
    devices: Annotated[str, Option(help="two; cpu,cpu: a tiny model")] = "cuda:0,cuda:1",
    chat_trace: Annotated[Path | None, Option(help="default: lengths as the workload chat has them")] = None,
    summary_trace: Annotated[Path | None, Option(help="default: lengths of summary, 16 tokens of output")] = None,
    seconds: Annotated[float, Option(min=1, help="of arrivals")] = 20.0,
    chunk: Annotated[int | None, Option(min=16, help="default: the server's")] = None,
    only: Annotated[list[str] | None, Option(help="these parts alone")] = None,
    output: Annotated[Path | None, Option(help="JSON file for the results")] = None,
    log_dir: Annotated[Path | None, Option(help="keeps the servers' logs")] = None,
) -> None:
    chat = Workload("trace", chat_trace) if chat_trace else Workload("chat")
    summary = Workload("trace", summary_trace) if summary_trace else Workload("summary", output_len=16)
    bench = Bench(devices.split(","), chat, summary, seconds, chunk)
    sections: dict[str, Section] = {
        "chat": bench.chat_rows,
        "summary": bench.summary_rows,
        "held": bench.held_rows,
        "overload": bench.overload_rows,
        "long-answers": bench.long_answer_rows,
        "streams": bench.stream_rows,
    }
    run_sections(sections, only, output, log_dir)


if __name__ == "__main__":
    run(main)
