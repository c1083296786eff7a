"""What the steps and copies of a deployment take, as a simulation is told: fitted to measured steps, or by rates."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from ensemble.models.spec import ModelSpec
from ensemble.scheduling.estimator import StepEstimator, StepShape, TimedStep
from tools.simulation.noise import OUT_S, RESPONSE_S, SENDERS, STEP_RATIOS, Distribution


class ToldEstimator(StepEstimator):
    """A replica's loop and the router have the same one. The engine tells it what a step took: once."""

    def __init__(self, steps: list[TimedStep]) -> None:
        """Tells it every step several times: it fits every 64 samples, and its last fit has to know all."""
        super().__init__()
        for step in steps * (2 + 256 // len(steps)):
            self.tell(step.shape, step.seconds)
        self._mixed.clear()
        self.overrun = 1.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        pass

    def tell(self, shape: StepShape, seconds: float) -> None:
        super().observe(shape, seconds)


class StepTimes(Protocol):
    def seconds(self, shape: StepShape) -> float: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates that were measured, not those of data sheets; bytes and FLOPs a second."""

    memory_bytes: int
    copy_rate: float
    matmul_rate: float  # fp16, large products
    launch_s: float = 40e-6  # of a layer, that nothing hides
    link_rate: float = 350e9  # to another GPU of the node
    host_rate: float = 50e9


GPUS = {
    "h100": Gpu(80 << 30, 3.0e12, 690e12),
    "h200": Gpu(141 << 30, 4.1e12, 700e12),
    "a100-80g": Gpu(80 << 30, 1.75e12, 260e12, link_rate=220e9, host_rate=22e9),
    "a100-40g": Gpu(40 << 30, 1.35e12, 260e12, link_rate=220e9, host_rate=22e9),
}
# Of the floor (weights and KV once, or FLOPs, at the rates above), as measured on H100: docs/results/engine-h100.json.
OVER_THE_FLOOR = 1.12
LIBRARY_READS = 0.88  # of the copy rate, as steps with short chunks were measured: 12 ms of LLaMA-2-13B, one without 10
# An all-reduce of a layer: by our kernel as far as it takes it, with what else such a step loses; NCCL's as measured
# (28.5 us of few rows, and what a prompt of 2,048 tokens of LLaMA-2-13B takes beyond half of its time on one GPU).
ALL_REDUCE_BASE_S = 12e-6
ONE_SHOT_BYTES = 4 << 20  # of all ranks together
NCCL_BASE_S, NCCL_LINK_SHARE = 28.5e-6, 0.73  # of the links' rate
GRID = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)  # tokens of a chunk
FRONT_S = 3e-3  # from a client to the router, of prompts of 800 and 2,000 tokens: 2 to 5 ms
RESERVE_BYTES = 4 << 30  # of each GPU: CUDA, graphs, activations


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model its cost depends on."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_weights: int  # that a token passes: without the input embedding
    num_bytes: int  # of a number

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * self.num_bytes

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.num_bytes


def step_s(model: ModelSize, gpu: Gpu, shape: StepShape, tp: int, node_link_rate: float | None = None) -> float:
    """Seconds of a step on `tp` GPUs: its floor, times what is measured over the floor, and the all-reduces.

    Floor: weights over the copy rate and products over the matmul rate, the KV of every row over the copy rate, and
    attention's FLOPs. Where the first two are about equal neither hides the other: products of 258 rows were measured
    at 1.4 times the larger one (docs/results/README.md). Products of prompts are cuBLAS's, which reads weights more
    slowly than our kernels for few rows do, and hides more: 254 tokens beside 2 rows take 14.5 ms in a server.
    """
    weights_s = model.weight_bytes / tp / gpu.copy_rate / (LIBRARY_READS if shape.num_prompt_tokens else 1)
    products_s = 2 * model.num_weights * shape.num_tokens / tp / gpu.matmul_rate
    rows_s = shape.num_row_keys * model.kv_token_bytes / tp / gpu.copy_rate
    heads = 4 * model.num_layers * model.num_heads * model.head_dim
    attention_s = heads * shape.num_prompt_keys / tp / (0.45 * gpu.matmul_rate)
    power = 3.5 if shape.num_prompt_tokens else 3  # the higher, the more of the smaller is hidden
    floor_s = (weights_s**power + products_s**power) ** (1 / power) + rows_s + attention_s
    reduce_s = 0.0
    if tp > 1:
        num_bytes = shape.num_tokens * model.hidden_size * model.num_bytes
        is_one_shot = num_bytes * tp <= ONE_SHOT_BYTES
        base_s, share = (ALL_REDUCE_BASE_S, 1.0) if is_one_shot else (NCCL_BASE_S, NCCL_LINK_SHARE)
        moved_s = num_bytes * 2 * (tp - 1) / tp / (share * (node_link_rate or gpu.link_rate))
        reduce_s = 2 * model.num_layers * (base_s + moved_s)
    return float(OVER_THE_FLOOR * floor_s + reduce_s + gpu.launch_s)


@dataclass(frozen=True, slots=True)
class StepRates:
    """Steps of a model on `tp` GPUs of a kind that is not here."""

    model: ModelSize
    gpu: Gpu
    tp: int = 1
    factor: float = 1.0

    def seconds(self, shape: StepShape) -> float:
        return self.factor * step_s(self.model, self.gpu, shape, self.tp)


class Costs(msgspec.Struct, kw_only=True, frozen=True):
    """Of one replica of one model on one kind of device. Seconds and bytes."""

    steps: list[TimedStep]  # what estimators are fitted to
    kv_token_bytes: int  # of the whole model
    num_kv_tokens: int  # that a replica's pool holds
    rates: StepRates | None = None  # what steps take, where that is not what an estimator says
    runs_ahead: bool = True  # a step is launched before the one before is read: on GPUs
    pull_base_s: float = 0.2e-3  # of a hand-off's copy
    pull_bytes_per_s: float = 280e9
    swap_bytes_per_s: float = 50e9
    control_s: float = 1e-3  # from the router to a replica, or back
    front_s: float = 2e-3  # from the client to the router
    back_s: float = 1e-3  # from the router to the client
    # tools/simulation/noise.py
    step_ratios: Distribution = []  # of a step over what is predicted
    out_s: Distribution = []  # of a step's tokens from the router to the senders
    response_s: Distribution = []  # of a response there
    num_senders: int = SENDERS["ensemble"]  # each of which has one response at a time

    @property
    def times(self) -> StepTimes:
        """What steps take, but for noise."""
        return self.rates or self.estimator()

    def estimator(self) -> ToldEstimator:
        """Fitted to the steps."""
        return ToldEstimator(self.steps)

    def scaled(self, factor: float) -> "Costs":
        """Steps that take so many times as long."""
        steps = [TimedStep(step.shape, step.seconds * factor) for step in self.steps]
        rates = self.rates and replace(self.rates, factor=self.rates.factor * factor)
        return msgspec.structs.replace(self, steps=steps, rates=rates)


def read_costs(path: Path) -> Costs:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Costs)
    except OSError as error:
        raise ConfigError(f"--costs {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--costs {path}: {error}") from None


def write_costs(path: Path, costs: Costs) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=0) + b"\n")


def predicted_steps(model: ModelSize, gpu: Gpu, tp: int, max_num_tokens: int, max_len: int) -> list[TimedStep]:
    """A grid of steps for the estimator to be fitted to, where none were measured."""
    lens = [length for length in (64, 512, 2048, 8192, 32768) if length <= max_len] or [max_len]
    shapes = [StepShape.of([], [length] * size) for size in (1, 4, 16, 64, 256) for length in lens]
    for chunk in (size for size in GRID if size <= max(GRID[0], max_num_tokens)):
        for start in (0, *(length for length in lens if length + chunk <= max_len)):
            shapes += [StepShape.of([(start, chunk)], [lens[len(lens) // 2]] * rows) for rows in (0, 16)]
    return [TimedStep(shape, step_s(model, gpu, shape, tp)) for shape in shapes]


def model_size(spec: ModelSpec, num_bytes: int = 2) -> ModelSize:
    """Of a model served in numbers of so many bytes."""
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    inner = (3 if spec.architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    num_weights = spec.num_layers * (attention + inner) + spec.vocab_size * spec.hidden_size
    return ModelSize(
        spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, num_weights, num_bytes
    )


def kv_tokens(model: ModelSize, gpu: Gpu, num_gpus: int, utilization: float) -> int:
    """Tokens whose KV fits beside the weights on so many GPUs that share a model; 0: the weights do not fit."""
    num_embedding_bytes = model.num_bytes * model.hidden_size * 32_000  # the input's, of about that size
    left = gpu.memory_bytes * utilization * num_gpus - model.weight_bytes - num_embedding_bytes
    return max(0, int((left - RESERVE_BYTES * num_gpus) // model.kv_token_bytes))


class SideCosts(NamedTuple):
    """Of replicas at home in decode, and of those at home in prefill, whose degrees may differ."""

    decode: Costs
    prefill: Costs

    def by(self, endpoint: str) -> "SideCosts":
        """As clients of that model have them."""
        return SideCosts(*(msgspec.structs.replace(each, num_senders=SENDERS[endpoint]) for each in self))

    def changed(self, factor: float, front_s: float) -> "SideCosts":
        """With steps that take so many times as long, and so many seconds more from the client to the router."""
        return SideCosts(
            *(msgspec.structs.replace(each.scaled(factor), front_s=max(0.0, each.front_s + front_s)) for each in self)
        )


def predicted_costs(spec: ModelSpec, gpu: Gpu, deployment: Deployment) -> SideCosts:
    """Of replicas of these degrees on GPUs of a kind that is not here. Raises ConfigError where the model does not
    fit."""
    model, sides = model_size(spec), []
    max_len = deployment.model.limit_model_len(spec.max_model_len)
    for stage in (deployment.decode, deployment.prefill if deployment.prefill.devices else deployment.decode):
        tp, num_places = stage.tensor_parallel_size, stage.pipeline_parallel_size
        num_kv_tokens = kv_tokens(model, gpu, tp * num_places, stage.gpu_memory_utilization)
        if num_kv_tokens < deployment.block_size:
            raise ConfigError(
                f"model {spec.path}: {model.weight_bytes >> 30} GiB of weights do not fit {tp * num_places} such GPUs"
            )
        found = costs_by_rates(model, gpu, tp, num_kv_tokens, deployment.prefill.max_num_batched_tokens, max_len)
        sides.append(found.scaled(1 / num_places))
    return SideCosts(*sides)


def costs_by_rates(model: ModelSize, gpu: Gpu, tp: int, num_kv_tokens: int, max_num_tokens: int, max_len: int) -> Costs:
    return Costs(
        steps=predicted_steps(model, gpu, tp, max_num_tokens, max_len),
        rates=StepRates(model, gpu, tp),
        kv_token_bytes=model.kv_token_bytes,
        num_kv_tokens=num_kv_tokens,
        pull_bytes_per_s=0.8 * gpu.link_rate * tp,
        swap_bytes_per_s=gpu.host_rate * tp,
        front_s=FRONT_S,
        step_ratios=STEP_RATIOS,
        out_s=OUT_S,
        response_s=RESPONSE_S,
    )
