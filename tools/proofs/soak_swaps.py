"""A swap storm: 2,000 random requests through servers whose decode pool is so small that most sequences are swapped.

    python -m tools.proofs.soak_swaps --output docs/results/soak-swaps.json

The requests are divided over the decode policies, and one more part whose decode replica computes the prompts too. The
first requests of each part are all served to their end, so that every byte that was swapped out has to come back; of
those after them some clients go away. They come in waves, each after requests whose outputs end early, so that more are
admitted than there is room for. In float64, where tokens are the same whatever the batch, every output must be
that of the engine without a server and with room for all, sampled ones included, and what came before a cancel must be
its beginning. Afterwards every block must be free, nothing swapped, and processes and names in /dev/shm those of the
start.
"""

import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from ensemble.config import DecodePolicyName, Deployment
from ensemble.engine.engine import Engine, load_engine
from ensemble.request import Request, SamplingParams
from tools.benchmarks.results import at_least, exactly, report
from tools.offline import generate
from tools.proofs.gpu_smoke import write_model_dir
from tools.proofs.grpc_request import Answer, Inputs, ask
from tools.server.server_state import Metrics, processes, shared_memory
from tools.server.tiny_server import TINY_MODEL
from tools.server.triton_server import TritonServer

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64
NUM_DEVICE_BLOCKS, NUM_HOST_BLOCKS = 16, 400  # a sequence has up to 9
NUM_CLIENTS, MAX_NUM_SEQS = 40, 8
EARLY_PER_WAVE = 60  # a wave: as many requests as there are clients
MAX_PROMPT_LEN, MAX_TOKENS = 24, 120
CALM_SHARE = 0.6  # of a part's requests, the first ones, of which no client goes away
CANCELLED_SHARE = 0.3  # at most, of those after them
LONGEST_STAY_S = 1.0  # of a client that goes away
REQUEST_TIMEOUT_S = 120.0
GRACE_S = 10.0  # for blocks to come back, and for the metrics to say so
VOCAB_SIZE: int = TINY_MODEL["vocab_size"]
EOS_TOKEN_IDS = list(range(VOCAB_SIZE // 4))  # outputs that do not ignore them end early
WEIGHTS_SCALE = 5.0
MIN_PREEMPTIONS = 0.5  # for each request of a part

Figures = dict[str, float]
FAULTS = {  # figure |-> unit; each has to be 0
    "requests hung, or with an error": "requests",
    "requests whose output differs": "requests",
    "blocks in use at the end, in the pools of both stages": "blocks",
    "sequences swapped at the end": "sequences",
    "swapped bytes that did not come back, before any cancel": "bytes",
    "processes that are not those of the start": "processes",
    "names in /dev/shm that are not those of the start": "names",
}
UNITS = FAULTS | {
    "requests": "requests",
    "requests before the waves, whose outputs end early": "requests",
    "requests cancelled": "requests",
    "output tokens compared": "tokens",
    "preemptions": "sequences",
    "bytes of sequences cancelled while swapped out": "bytes",
    "time under load": "s",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's answer, beside what the engine says without a server."""

    answer: Answer
    expected: list[int]
    goes_away: bool  # its client, if it has not ended by then

    @property
    def has_failed(self) -> bool:
        return self.answer.error is not None or not (self.answer.has_ended or self.goes_away)

    @property
    def differs(self) -> bool:
        if self.has_failed:
            return False
        output_ids = self.answer.output_ids
        return output_ids != (self.expected if self.answer.has_ended else self.expected[: len(output_ids)])


def write_model(path: Path) -> None:
    """Weights with which every output showed a block that was zeroed in its midst; with dummy ones, 41 of 57 did."""
    write_model_dir(path, TINY_MODEL | {"eos_token_id": EOS_TOKEN_IDS})
    weights = load({"path": path, "dtype": "float64", "load_format": "dummy"}).runner.model.named_weights()
    scaled = {each.name: each.tensor * (WEIGHTS_SCALE if each.tensor.ndim > 1 else 1.0) for each in weights}
    save_file(scaled, path / "model.safetensors")


def load(model: dict[str, Any]) -> Engine:
    """An engine with room for all."""
    stage = {"devices": ["cpu"], "kv_cache_bytes": 64 << 20}
    deployment = Deployment.parse({"model": model, "prefill": stage, "decode": stage})
    return load_engine(deployment, deployment.decode, torch.device("cpu"))


def deployments(model: Path) -> dict[str, Deployment]:
    """Name of a part |-> its deployment."""
    decode: dict[str, Any] = {
        "devices": ["cpu"],
        "num_threads": 1,
        "quantum_s": 0.01,
        "starvation_s": 0.5,
        "kv_cache_bytes": NUM_DEVICE_BLOCKS * BLOCK_BYTES,
        "host_kv_bytes": NUM_HOST_BLOCKS * BLOCK_BYTES,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_resident_seqs": NUM_CLIENTS,
    }
    raw: dict[str, Any] = {"model": {"path": model, "dtype": "float64"}}
    apart = raw | {"prefill": {"devices": ["cpu"], "num_threads": 1, "kv_cache_bytes": 32 << 20}}
    parts = {policy: apart | {"decode": decode | {"policy": policy}} for policy in get_args(DecodePolicyName)}
    parts["colocated, sj-mlfq"] = raw | {
        "mode": "colocated",
        "prefill": {"max_num_batched_tokens": 64},
        "decode": decode | {"policy": "sj-mlfq", "batching": "mixed"},
    }
    return {name: Deployment.parse(part) for name, part in parts.items()}


def make_requests(count: int, rng: random.Random) -> list[Request]:
    """`count` requests in waves, and before each wave EARLY_PER_WAVE others whose outputs end far before their limit.

    By what those needed, more of the wave are admitted than there is room for.
    """
    requests: list[Request] = []
    for index in range(count):
        if index % NUM_CLIENTS == 0:
            requests += [make_request(len(requests) + i, rng, ends_early=True) for i in range(EARLY_PER_WAVE)]
        requests.append(make_request(len(requests), rng, ends_early=False))
    return requests


def make_request(request_id: int, rng: random.Random, ends_early: bool) -> Request:
    max_tokens = rng.choice([rng.randint(1, 40), rng.randint(40, MAX_TOKENS), MAX_TOKENS])
    return Request(
        request_id=request_id,
        prompt_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, MAX_PROMPT_LEN))],
        sampling=SamplingParams(
            max_tokens=MAX_TOKENS if ends_early else max_tokens,
            temperature=1.5 if ends_early else rng.choice([0.0, 0.5, 1.0, 1.5]),  # exact in float32, as it is sent
            seed=rng.getrandbits(64),
            ignore_eos=not ends_early,
        ),
        priority=rng.randrange(4),
    )


def as_inputs(request: Request) -> Inputs:
    sampling = request.sampling
    return {
        "input_ids": np.array(request.prompt_token_ids, np.int32),
        "max_tokens": np.array([sampling.max_tokens], np.int32),
        "temperature": np.array([sampling.temperature], np.float32),
        "seed": np.array([sampling.seed], np.uint64),
        "ignore_eos": np.array([sampling.ignore_eos]),
        "priority": np.array([request.priority], np.int32),
        "stream": np.ones(1, bool),
        "return_output_ids": np.ones(1, bool),
    }


def send(
    server: TritonServer, requests: list[Request], expected: list[list[int]], stays_s: list[float]
) -> list[Outcome]:
    """Each client sends its next request when the last has ended, or when it has stayed for as long as it stays."""

    def one(index: int) -> Outcome:
        answer = ask(server.grpc_url, as_inputs(requests[index]), stays_s[index])
        return Outcome(answer, expected[index], goes_away=stays_s[index] < REQUEST_TIMEOUT_S)

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        return list(clients.map(one, range(len(requests))))


def bytes_not_back(metrics: Metrics) -> float:
    """Swapped out, and not in again: they are on the host still, or their sequence was cancelled there."""
    out, back = (metrics.total("distserve:swap_bytes_total", f'direction="{way}"') for way in ("out", "in"))
    return out - back


def at_rest(server: TritonServer, num_served: int) -> Metrics:
    """The metrics when they know of so many requests' ends and nothing is in use, or after GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    while True:
        metrics = Metrics(server)
        is_free = metrics.blocks_in_use == 0 and metrics.total("vllm:num_requests_swapped") == 0
        if (is_free and metrics.total("vllm:request_success_total") >= num_served) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.1)


def run_part(
    deployment: Deployment, requests: list[Request], expected: list[list[int]], rng: random.Random, log: Path
) -> Figures:
    num_calm = round(CALM_SHARE * len(requests))
    stays_s = [
        rng.uniform(0, LONGEST_STAY_S) if index >= num_calm and rng.random() < CANCELLED_SHARE else REQUEST_TIMEOUT_S
        for index in range(len(requests))
    ]
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=120)
        pids, names = {each.pid for each in processes(server)}, set(shared_memory(server))
        start = time.monotonic()
        outcomes = send(server, requests[:num_calm], expected[:num_calm], stays_s[:num_calm])
        calm = at_rest(server, num_calm)
        outcomes += send(server, requests[num_calm:], expected[num_calm:], stays_s[num_calm:])
        seconds = time.monotonic() - start
        end = at_rest(server, sum(each.answer.has_ended for each in outcomes))
        left_pids, left_names = {each.pid for each in processes(server)}, set(shared_memory(server))
    return {
        "requests": sum(request.sampling.ignore_eos for request in requests),
        "requests before the waves, whose outputs end early": sum(not each.sampling.ignore_eos for each in requests),
        "requests cancelled": sum(not each.answer.has_ended for each in outcomes),
        "output tokens compared": sum(len(each.answer.output_ids) for each in outcomes),
        "preemptions": end.total("vllm:num_preemptions_total"),
        "bytes of sequences cancelled while swapped out": bytes_not_back(end) - bytes_not_back(calm),
        "time under load": round(seconds, 1),
        "requests hung, or with an error": sum(each.has_failed for each in outcomes),
        "requests whose output differs": sum(each.differs for each in outcomes),
        "blocks in use at the end, in the pools of both stages": end.blocks_in_use,
        "sequences swapped at the end": end.total("vllm:num_requests_swapped"),
        "swapped bytes that did not come back, before any cancel": bytes_not_back(calm),
        "processes that are not those of the start": len(pids ^ left_pids),
        "names in /dev/shm that are not those of the start": len(names ^ left_names),
    }


def rows_of(parts: dict[str, Figures]) -> list[dict[str, Any]]:
    """A row for each figure: all parts together, and each. No part's fault makes up for another's."""
    rows = []
    for name in next(iter(parts.values())):
        by_part = {part: figures[name] for part, figures in parts.items()}
        total, unit = round(sum(map(abs, by_part.values())), 1), UNITS[name]
        row = exactly(name, total, unit, 0) if name in FAULTS else {"name": name, "value": total, "unit": unit}
        rows.append(row | {"parts": by_part})
    fewest = min(figures["preemptions"] / figures["requests"] for figures in parts.values())
    return [
        *rows,
        at_least("preemptions for each request, of the part with the fewest", round(fewest, 2), "", MIN_PREEMPTIONS),
    ]


def main(
    requests: Annotated[int, typer.Option(min=60, help="of all parts' waves together")] = 2000,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the summary")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the servers' logs here")] = None,
) -> None:
    """Exit status 1 if an output differs, anything is left over, or too little was swapped."""
    console, rng = Console(width=150, highlight=False), random.Random(seed)
    parts: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        engine = load({"path": model, "dtype": "float64"})
        by_part = deployments(model)
        for index, (name, deployment) in enumerate(by_part.items()):
            count = requests * (index + 1) // len(by_part) - requests * index // len(by_part)
            asked = make_requests(count, rng)
            alone = generate(engine, asked)
            expected = [alone[request.request_id].output_token_ids for request in asked]
            log = (log_dir or Path(folder)) / f"soak-swaps-{index}.log"
            parts[name] = run_part(deployment, asked, expected, rng, log)
            console.print(f"{name}: {parts[name]}")
    rows = rows_of(parts)
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
