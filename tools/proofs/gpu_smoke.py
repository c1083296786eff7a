"""Serves OPT-1.3b- and SmolLM2-shaped models (dummy weights) disaggregated on GPUs; compares with the offline engine.

    python -m tools.proofs.gpu_smoke --output docs/results/gpu-smoke.json
    python -m tools.proofs.gpu_smoke --prefill-device cuda:0 --decode-device cuda:1
    python -m tools.proofs.gpu_smoke --colocated

The Triton server runs one prefill and one decode worker; KV goes over by CUDA IPC. Greedy tokens in fp32 (TF32 off)
must equal the offline engine's on the same GPU up to the first where the served one's log-probability is within 1e-3
of the best.
"""

import gc
import json
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import tritonclient.grpc as grpc
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ensemble.config import GPU_BLOCK_SIZE, Deployment
from ensemble.engine.batch import Batch, PrefillRow, prepare_step
from ensemble.engine.engine import Engine, load_engine
from ensemble.engine.staging import Staging
from ensemble.request import Request, SamplingParams, Sequence
from tools.benchmarks.results import exactly, report
from tools.offline import generate
from tools.proofs.grpc_request import Inputs, make_tensors
from tools.server.triton_server import TritonServer

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "eos_token_id": 2,
    },
    "OPT-1.3b": {
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "vocab_size": 50272,
        "eos_token_id": 2,
    },
}
MARGIN = 1e-3
READY_TIMEOUT_S, SERVE_TIMEOUT_S = 200.0, 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """What a server made of some requests."""

    output_ids: list[list[int]]
    metrics: dict[str, list[int]]  # the timelines' figures
    seconds: float  # for all of them
    ready_s: float  # from the server's start on


@dataclass(frozen=True, slots=True)
class Comparison:
    """Served outputs beside the offline engine's."""

    num_equal: int  # to the last token
    tie_margins: list[float]  # of those equal up to a near tie: log-probability of the best token over the served one's
    faults: list[str]


def write_model_dir(path: Path, config: dict[str, Any]) -> None:
    """config.json and a byte-level tokenizer of the right size: what `load_format: dummy` needs."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    vocabulary |= {f"token{index}": index for index in range(len(alphabet), config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def make_requests(count: int, vocab_size: int, max_tokens: int) -> list[Request]:
    rng = random.Random(0)
    lengths = [1, 15, 16, 17, 500, 1000] + [rng.randint(1, 400) for _ in range(count)]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(vocab_size) for _ in range(length)],
            sampling=sampling,
        )
        for index, length in enumerate(lengths[:count])
    ]


def greedy_inputs(prompt_token_ids: list[int], max_tokens: int) -> Inputs:
    """Of a streamed request for exactly `max_tokens` greedy tokens, with their ids and the timeline."""
    return {
        "input_ids": np.array(prompt_token_ids, np.int32),
        "max_tokens": np.array([max_tokens], np.int32),
        "temperature": np.zeros(1, np.float32),
        "ignore_eos": np.ones(1, bool),
        "stream": np.ones(1, bool),
        "return_output_ids": np.ones(1, bool),
        "return_perf_metrics": np.ones(1, bool),
    }


def serve(server: TritonServer, requests: list[Request]) -> tuple[list[list[int]], dict[str, list[int]], float]:
    """All requests at once on one gRPC stream: output ids, the timelines' figures, and the seconds it took."""
    client = grpc.InferenceServerClient(server.grpc_url)
    output_ids: list[list[int]] = [[] for _ in requests]
    metrics: dict[str, list[int]] = {}
    errors: list[Exception] = []
    num_open = len(requests)

    def receive(result: Any, error: Exception | None) -> None:
        nonlocal num_open
        if error is not None:
            errors.append(error)
            num_open = 0
            return
        response = result.get_response()
        for output in response.outputs:
            values = result.as_numpy(output.name)
            if output.name == "output_ids":
                output_ids[int(response.id)] += values.tolist()
            elif output.name != "text_output":
                metrics.setdefault(output.name, []).append(int(values[0]))
        num_open -= response.parameters["triton_final_response"].bool_param

    client.start_stream(receive)
    start = time.perf_counter()
    for request in requests:
        inputs = make_tensors(greedy_inputs(request.prompt_token_ids, request.sampling.max_tokens))
        client.async_stream_infer(
            "scheduler", inputs, request_id=str(request.request_id), enable_empty_final_response=True
        )
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    while num_open > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    seconds = time.perf_counter() - start
    client.stop_stream()
    if errors:
        raise errors[0]
    return output_ids, metrics, seconds


@torch.inference_mode()
def margin(engine: Engine, request: Request, output_ids: list[int], token_id: int) -> float:
    """By how much the log-probability of `token_id` after prompt + output_ids is below the best, by the engine."""
    token_ids = request.prompt_token_ids + output_ids
    sequence = Sequence(Request(request_id=0, prompt_token_ids=token_ids, sampling=request.sampling))
    sequence.block_ids = list(range(engine.blocks.blocks_for(len(token_ids))))
    runner = engine.runner
    batch = Batch([PrefillRow(sequence, 0, len(token_ids))])
    device = engine.pool.tensor.device
    step = prepare_step(batch, runner.block_size, {}, Staging(device), {})
    hidden = runner.model.forward(step.token_ids, step.positions, runner.kv_pool, step.attention)
    log_probs = torch.log_softmax(runner.model.compute_logits(hidden[-1:]).float(), -1)[0]
    return float(log_probs.max() - log_probs[token_id])


def compare(
    engine: Engine,
    requests: list[Request],
    alone: Mapping[int, Sequence],  # by request_id: what the engine makes of them
    served: list[list[int]],
    near_tie: float = MARGIN,
) -> Comparison:
    num_equal, tie_margins, faults = 0, [], []
    for request, output in zip(requests, served, strict=True):
        expected = alone[request.request_id].output_token_ids
        if output == expected:
            num_equal += 1
            continue
        if len(output) != len(expected):
            faults.append(f"request {request.request_id}: {len(output)} tokens of {len(expected)}")
            continue
        first = next(i for i, (a, b) in enumerate(zip(output, expected, strict=True)) if a != b)
        below = margin(engine, request, expected[:first], output[first])
        if below < near_tie:
            tie_margins.append(below)
        else:
            faults.append(f"request {request.request_id}: token {first} of {len(output)}, {below:.4f} below the best")
    return Comparison(num_equal, tie_margins, faults)


def serve_fleet(deployment: Deployment, requests: list[Request], log: Path) -> Served:
    """By a server of their own, all at once. Raises ServerError."""
    start = time.perf_counter()
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=READY_TIMEOUT_S)
        ready_s = time.perf_counter() - start
        others = [msgspec.structs.replace(each, prompt_token_ids=each.prompt_token_ids[::-1]) for each in requests]
        serve(server, others)  # compiles kernels, and leaves no prefix that would need no computing
        return Served(*serve(server, requests), ready_s)


def run_shape(name: str, deployment: Deployment, requests: list[Request], log: Path) -> list[dict[str, Any]]:
    served = serve_fleet(deployment, requests, log)
    engine = load_engine(deployment, deployment.decode, torch.device(deployment.decode.devices[0]))
    comparison = compare(engine, requests, generate(engine, requests), served.output_ids)
    del engine
    free_memory()
    return rows_of(name, served, comparison, is_apart=deployment.mode == "disaggregated")


def free_memory() -> None:
    """Of the GPU: what nobody refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def rows_of(name: str, served: Served, comparison: Comparison, *, is_apart: bool) -> list[dict[str, Any]]:
    num_requests, metrics, faults = len(served.output_ids), served.metrics, comparison.faults
    num_alike = comparison.num_equal + len(comparison.tie_margins)
    moved, copy_ns = sum(metrics["kv_transfer_bytes"]), sum(metrics["kv_transfer_time_ns"])
    first_ns = [
        first - arrival
        for first, arrival in zip(metrics["first_token_time_ns"], metrics["arrival_time_ns"], strict=True)
    ]
    num_tokens = sum(map(len, served.output_ids))
    return [
        {"name": f"{name}: outputs equal to tools.offline", "value": comparison.num_equal, "unit": "requests"},
        exactly(f"{name}: equal, or up to a near tie", num_alike, "requests", num_requests),
        {"name": f"{name}: faults", "value": faults, "unit": "", "goal": [], "met": not faults},
        *(transfer_rows(name, moved, copy_ns) if is_apart else []),
        {"name": f"{name}: output tokens", "value": round(num_tokens / served.seconds), "unit": "tokens/s"},
        {"name": f"{name}: TTFT, mean", "value": round(sum(first_ns) / len(first_ns) / 1e6, 1), "unit": "ms"},
        {"name": f"{name}: start to ready", "value": round(served.ready_s, 1), "unit": "s"},
    ]


def transfer_rows(name: str, num_bytes: int, nanoseconds: int) -> list[dict[str, Any]]:
    met = num_bytes > 0
    return [
        {"name": f"{name}: KV moved by CUDA IPC", "value": num_bytes, "unit": "bytes", "goal": 1, "met": met},
        {"name": f"{name}: KV copy rate", "value": round(num_bytes / nanoseconds, 2), "unit": "GB/s"},
    ]


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    prefill_device: str = "cuda:0",
    decode_device: str = "cuda:0",
    colocated: Annotated[bool, typer.Option(help="both in one worker, on the decode device")] = False,
    dtype: str = "float32",
    num_requests: int = 32,
    max_tokens: int = 64,
    log_dir: Annotated[Path | None, typer.Option(help="keeps the server's logs here")] = None,
) -> None:
    """Runs both shapes; exit status 1 if an output differs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    logs = log_dir or Path(tempfile.mkdtemp(prefix="gpu-smoke-"))
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            write_model_dir(path, config)
            share = 0.3 if prefill_device == decode_device and not colocated else 0.6
            deployment = Deployment.parse(
                {
                    "mode": "colocated" if colocated else "disaggregated",
                    "model": {"path": path, "dtype": dtype, "load_format": "dummy"},
                    "prefill": {"devices": [] if colocated else [prefill_device], "gpu_memory_utilization": share},
                    "decode": {"devices": [decode_device], "gpu_memory_utilization": share},
                    "block_size": GPU_BLOCK_SIZE,
                }
            )
            requests = make_requests(num_requests, config["vocab_size"], max_tokens)
            rows += run_shape(name, deployment, requests, logs / f"{name}.log")
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
