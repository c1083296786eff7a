"""Every pair of degrees, tp and pp from 1 to 3 in prefill and in decode, says what one process says.

    python -m tools.proofs.parallel_grid --output docs/results/parallel-cpu.json

On the CPU in float64, where tokens are the same whatever the order of sums: greedy and drawn outputs of random prompts,
computed by the one replica in chunks and gone on with by the other, must be those of an engine of one rank; then every
block is free. The models are tiny: OPT, and LLaMA with 2 KV heads and with 1 for 6 query heads. Each replica is
ranks in threads of this process, with gloo, sockets and pools between them as between processes.
"""

import random
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from ensemble.config import Deployment
from ensemble.engine.engine import load_engine
from ensemble.protocol.router_replica import Arrival, Event, Join, KVHandoff, PromptChunk, RunPrompts, StepDone
from ensemble.request import Request, SamplingParams
from tools.benchmarks.results import exactly, report
from tools.offline import generate
from tools.proofs.gpu_smoke import write_model_dir
from tools.proofs.rank_threads import CPU, RankThreads
from tools.server.tiny_server import TINY_MODEL

WEIGHTS_SCALE = 5.0  # of dummy weights, with which outputs are all alike
CHUNK, MAX_TOKENS, TIME_LIMIT_S = 16, 10, 60.0
SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 4}
MODELS: dict[str, dict[str, Any]] = {
    "OPT": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 96,
        "max_position_embeddings": 512,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "vocab_size": 384,
        "eos_token_id": 2,
    },
    "LLaMA, 2 KV heads": TINY_MODEL | SIX_HEADS | {"num_key_value_heads": 2},
    "LLaMA, 1 KV head": TINY_MODEL | SIX_HEADS | {"num_key_value_heads": 1},
}
Degrees = tuple[int, int]  # tp, pp


def write_model(path: Path, config: dict[str, Any]) -> None:
    write_model_dir(path, config)
    deployment = deploy({"path": path, "dtype": "float64", "load_format": "dummy"}, (1, 1), (1, 1))
    weights = load_engine(deployment, deployment.decode, CPU).runner.model.named_weights()
    scaled = {each.name: each.tensor * (WEIGHTS_SCALE if each.tensor.ndim > 1 else 1.0) for each in weights}
    save_file(scaled, path / "model.safetensors")


def deploy(model: dict[str, Any], prefill: Degrees, decode: Degrees) -> Deployment:
    stages = {
        name: {"devices": ["cpu"] * tp * pp, "tp": tp, "pp": pp, "kv_cache_bytes": 4 << 20}
        for name, (tp, pp) in (("prefill", prefill), ("decode", decode))
    }
    stages["prefill"]["max_num_batched_tokens"] = CHUNK
    return Deployment.parse({"model": model, **stages})


def make_requests() -> list[Request]:
    rng = random.Random(5)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(length)],
            sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=float(index % 4 == 3), seed=index),
        )
        for index, length in enumerate([1, 2, 15, 16, 17, 33, 60, 100])
    ]


def run(replica: RankThreads) -> list[Event]:
    """Until there is nothing to do."""
    events: list[Event] = []
    deadline = time.monotonic() + TIME_LIMIT_S
    while replica.loop.has_work or replica.peers.attaching:
        if time.monotonic() > deadline:
            raise TimeoutError(f"a replica has work after {TIME_LIMIT_S:.0f} s")
        if replica.peers.attaching:
            events += replica.loop.receive_handles()
        events += replica.loop.step() if replica.loop.has_work else []
    return events


def serve(prefill: RankThreads, decode: RankThreads, requests: list[Request]) -> dict[int, list[int]]:
    """request_id |-> output."""
    chunks = [PromptChunk(request_id=each.request_id, end=each.prompt_len, request=each) for each in requests]
    prefill.loop.handle(RunPrompts(batch_id=0, chunks=chunks))
    outputs: dict[int, list[int]] = {request.request_id: [] for request in requests}
    handoffs = collect(run(prefill), outputs)
    arrivals = [
        Arrival(request=each, output_token_ids=list(outputs[each.request_id]), handoff=handoffs[each.request_id])
        for each in requests
        if each.request_id in handoffs
    ]
    decode.loop.handle(Join(arrivals=arrivals))
    collect(run(decode), outputs)
    while prefill.loop.leases:
        if not prefill.server.socket.poll(round(TIME_LIMIT_S * 1e3)):
            raise TimeoutError("a lease is not acknowledged")
        prefill.loop.end_leases(prefill.server.acknowledged())
    return outputs


def collect(events: list[Event], outputs: dict[int, list[int]]) -> dict[int, KVHandoff]:
    """Appends the events' tokens; returns their hand-offs by request_id."""
    handoffs = {}
    for event in events:
        if isinstance(event, StepDone):
            for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                outputs[request_id].append(token_id)
            handoffs.update({handoff.request_id: handoff for handoff in event.handoffs})
    return handoffs


def check_model(path: Path, degrees: list[Degrees], console: Console) -> tuple[int, int, int]:
    """Pairs that said something else, or left blocks in use; pairs in all; distinct tokens of the outputs."""
    model = {"path": path, "dtype": "float64"}
    requests = make_requests()
    alone = deploy(model, (1, 1), (1, 1))
    done = generate(load_engine(alone, alone.decode, CPU), requests)
    expected = {request_id: sequence.output_token_ids for request_id, sequence in done.items()}
    num_wrong = num_pairs = 0
    for prefill_degrees, decode_degrees in product(degrees, degrees):
        deployment = deploy(model, prefill_degrees, decode_degrees)
        with tempfile.TemporaryDirectory() as run_dir:
            prefill = RankThreads(deployment, "prefill", f"ipc://{run_dir}/prefill")
            decode = RankThreads(deployment, "decode", f"ipc://{run_dir}/decode")
            outputs = serve(prefill, decode, requests)
            in_use = [each.engine.pool.num_blocks - each.loop.num_free_blocks for each in (prefill, decode)]
            decode.close()
            prefill.close()
        num_pairs += 1
        if outputs != expected or any(in_use):
            num_wrong += 1
            console.print(f"  prefill {prefill_degrees}, decode {decode_degrees}: differs, {in_use} blocks in use")
    return num_wrong, num_pairs, len({token for output in expected.values() for token in output})


def main(
    output: Annotated[Path | None, typer.Option(help="file for the results")] = None,
    max_degree: Annotated[int, typer.Option(min=1, max=3, help="of both kinds, on both sides")] = 3,
) -> None:
    """Compares every pair of degrees with one process."""
    torch.set_num_threads(1)
    console = Console(stderr=True, highlight=False)
    degrees = [(tp, pp) for tp in range(1, max_degree + 1) for pp in range(1, max_degree + 1)]
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for name, config in MODELS.items():
        console.print(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            write_model(path, config)
            num_wrong, num_pairs, num_distinct = check_model(path, degrees, console)
        rows.append(exactly(f"{name}: pairs that differ from one process", num_wrong, "pairs", 0))
        rows.append({"name": f"{name}: pairs of (tp, pp) compared", "value": num_pairs, "unit": "pairs"})
        rows.append({"name": f"{name}: distinct tokens in the outputs", "value": num_distinct, "unit": "tokens"})
    rows.append({"name": "time", "value": round(time.monotonic() - start, 1), "unit": "s"})
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
