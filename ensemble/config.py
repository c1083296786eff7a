"""The deployment: one YAML file, validated once, frozen. `tools.serve` writes it from flags; every model reads it."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ensemble.errors import ConfigError, sendable

PolicyName = Literal["fcfs", "sjf", "priority", "edf", "fair"]  # of the queue, see scheduling/policies.py
DecodePolicyName = Literal["fcfs", "srpt", "priority", "mlfq", "sj-mlfq"]  # see scheduling/decode_policies.py
Device = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")]
Dtype = Literal["auto", "float16", "bfloat16", "float32", "float64"]

# How a replica that computes prompts too fills its steps: with both, or with prompts alone as long as there are any.
Batching = Literal["mixed", "prefill-first"]

# How much a sequence is taken to need when it is admitted to decode: what it is expected to, by how long outputs were
# lately, or what it may at most. If expectations were too low, sequences are preempted.
Admission = Literal["optimistic", "reserved"]

# fixed: a replica does what its role says. auto: who computes a prompt is chosen for each by predicted times, among
# replicas that decode too, prefill replicas decode what the others have no room for, and roles shift with the load.
Roles = Literal["fixed", "auto"]

# What becomes of a request that is predicted to miss a target: computed all the same, or refused before it is.
OnMissedTarget = Literal["serve", "refuse"]

# When a client gets the first token of a sequence that goes on at another replica: when that has its KV, or at once.
FirstToken = Literal["held", "at_once"]

LauncherName = Literal["local", "ray"]  # what starts the workers: on this machine, or on the nodes of a Ray cluster

# How KV goes from replica to replica: read where it lies (CUDA IPC; between CPUs of one host shared memory), through
# page-locked host memory, or by NCCL (between CPUs gloo). auto: the first that works, of the first two.
Transport = Literal["auto", "cuda_ipc", "host", "nccl"]

StageName = Literal["prefill", "decode"]  # the model that is home to a replica's process
Role = Literal["prefill", "decode", "mixed"]  # what a replica is given: prompts to hand off, sequences, whole requests

DEPLOYMENT_VARIABLE = "DISTSERVE_DEPLOYMENT"  # environment variable that names the deployment file
TOKENS_BESIDE = 1024  # longer chunks double the gaps and bring prompts nothing: docs/results/README.md
GPU_BLOCK_SIZE, CPU_BLOCK_SIZE = 64, 16  # tokens, by default; on a GPU attention reads whole tiles (docs/results)


def model_name(path: Path) -> str:
    """What to call the model in `path`, which may be in the Hub's cache: `models--org--name/snapshots/<commit>`."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which model, and in which numbers."""

    path: Path  # a Hugging Face directory
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights of config.json's shape
    dtype: Dtype = "auto"  # auto: float32 on the CPU, on a GPU what config.json says
    max_model_len: int | None = Field(default=None, ge=2)  # None: what config.json says
    seed: int = 0  # of dummy weights
    served_name: str | None = Field(default=None, min_length=1, max_length=256)  # None: the directory's, or the Hub's

    @field_validator("path")
    @classmethod
    def _as_the_file_system_has_it(cls, path: Path) -> Path:
        """The stubs' interpreter takes ASCII for the file system's encoding: there other bytes stand for themselves."""
        return Path(os.fsdecode(str(path).encode(errors="surrogateescape")))

    @property
    def name(self) -> str:
        """What clients and metrics call it: text, whatever the bytes of the path."""
        return sendable(self.served_name or model_name(self.path))

    def limit_model_len(self, model_limit: int) -> int:
        """Tokens a sequence may have, prompt and output: `max_model_len`, at most the model's own limit."""
        if self.max_model_len is not None and self.max_model_len > model_limit:
            raise ConfigError(f"max_model_len = {self.max_model_len}: the model's own limit is {model_limit}")
        return self.max_model_len or model_limit


class StageConfig(_Frozen):
    """The replicas of one stage. A replica is a group of ranks, each a process on a device of its own.

    Ranks of a replica in their order: those of the first place of the pipeline, then those of the second, and so on.
    """

    devices: list[Device] = []  # of all ranks of the first replica, then of the second, and so on
    # Ranks among which each layer is divided: any divisor of the query heads.
    tensor_parallel_size: int = Field(default=1, ge=1, validation_alias=AliasChoices("tensor_parallel_size", "tp"))
    # Places of a pipeline, each of which has some of the layers.
    pipeline_parallel_size: int = Field(default=1, ge=1, validation_alias=AliasChoices("pipeline_parallel_size", "pp"))
    pipeline_layers: list[Annotated[int, Field(ge=1)]] | None = None  # of each place; None: equal in time
    kv_cache_bytes: int | None = Field(default=None, ge=1)  # None: 1 GiB on a CPU, the share below on a GPU
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)  # of the device's memory, for this stage's worker
    num_threads: int | None = Field(default=None, ge=1)  # torch threads on a CPU; None: an equal part of the cores
    max_num_seqs: int = Field(default=256, ge=1)  # sequences in one batch

    @property
    def num_ranks(self) -> int:
        """Of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_replicas(self) -> int:
        return len(self.devices) // self.num_ranks

    @property
    def replicas(self) -> list[str]:
        """The devices of each replica: its ranks', in order, joined by commas."""
        starts = range(0, len(self.devices), self.num_ranks)
        return [",".join(self.devices[start : start + self.num_ranks]) for start in starts]


class PrefillConfig(StageConfig):
    max_num_batched_tokens: int = Field(default=2048, ge=16)  # token budget of a batch
    # No prompt is started that, when it is computed, would wait longer for room in decode.
    max_bridge_wait_s: float = Field(default=0.5, ge=0)
    prefix_cache: bool = True  # every replica keeps the blocks of ended sequences, for prompts that begin alike
    # Of a batch, for prompts longer than that while shorter ones wait: a long one holds them up for no whole batch.
    max_long_tokens: int | None = Field(default=None, ge=16)


class DecodeConfig(StageConfig):
    """With a host pool, more sequences are taken than the device's pool holds, unless under fcfs: some are swapped."""

    admission: Admission = "optimistic"
    policy: DecodePolicyName = "fcfs"
    quantum_s: float = Field(default=0.05, gt=0)  # of the first level of mlfq; of a turn after starvation elsewhere
    starvation_s: float = Field(default=3.0, gt=0)  # who has not run for so long runs next
    max_num_resident_seqs: int | None = Field(default=None, ge=1)  # running, waiting and swapped; None: max_num_seqs
    host_kv_bytes: int = Field(default=0, ge=0)  # of the host pool, for each replica; 0: nothing is swapped
    headroom_blocks: int = Field(default=0, ge=0)  # kept free for the next iterations; at least one for each of a batch
    watermark: float = Field(default=0.01, ge=0, lt=1)  # share of the pool that optimistic admission leaves
    # Prompts computed beside the running sequences: tokens of them in a step. For mixed replicas 0 stands for
    # TOKENS_BESIDE, under roles auto for as many as its choices take. For those of role decode 0 is none; else they
    # compute prompts of at most max_local_prompt_len tokens while all prefill replicas are busy.
    local_prefill_tokens: int = Field(default=0, ge=0)
    max_local_prompt_len: int = Field(default=512, ge=1)
    batching: Batching = "mixed"

    @property
    def num_places(self) -> int:
        """Sequences that a replica takes: running, waiting and swapped."""
        return self.max_num_resident_seqs or self.max_num_seqs


class SchedulerConfig(_Frozen):
    """The queue of requests that wait for prefill. Policies: see scheduling/policies.py."""

    policy: PolicyName = "fcfs"
    max_wait_s: float = Field(default=30.0, gt=0)  # who has waited so long is overtaken by nobody who came later
    aging_s: float = Field(default=5.0, ge=0)  # priority: what a class is worth
    # Of requests that name none; under edf a deadline without any is a second. The chunks of prompts beside running
    # sequences are as long as the smallest ITL or TPOT target among these allows.
    ttft_target_ms: float | None = Field(default=None, gt=0)
    itl_target_ms: float | None = Field(default=None, gt=0)
    tpot_target_ms: float | None = Field(default=None, gt=0)
    on_missed_target: OnMissedTarget = "serve"
    roles: Roles = "fixed"
    min_prefill_replicas: int = Field(default=1, ge=1)  # auto: bounds of the replicas of role prefill
    max_prefill_replicas: int | None = Field(default=None, ge=1)  # None: all but one
    max_queue_requests: int = Field(default=4096, ge=1)
    max_queue_tokens: int = Field(default=4_000_000, ge=1)
    first_token: FirstToken = "held"
    max_recoveries: int = Field(default=3, ge=0)  # deaths of replicas that had a request alone, until it is given up

    @property
    def ttft_target_s(self) -> float | None:
        return None if self.ttft_target_ms is None else self.ttft_target_ms / 1e3

    @property
    def itl_target_s(self) -> float | None:
        """What no step should take longer than: the smaller of the ITL and the TPOT target."""
        given = [each for each in (self.itl_target_ms, self.tpot_target_ms) if each is not None]
        return min(given) / 1e3 if given else None

    @property
    def keeps_gaps(self) -> bool:
        """Whether that is of each gap between two tokens, not of their mean alone."""
        return self.itl_target_ms is not None


class TransferConfig(_Frozen):
    """KV between replicas."""

    transport: Transport = "auto"
    timeout_s: float = Field(default=10.0, gt=0)  # without an answer from the source, then the link counts as broken


class Deployment(_Frozen):
    """Everything the three models need to know.

    colocated: every replica is mixed, which computes the prompts of its sequences itself, and lives with `decode`.
    """

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    launcher: LauncherName = "local"
    model: ModelConfig
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    block_size: int = Field(default=16, ge=1, le=256)
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]+")  # of a collector of spans (HTTP)
    # A worker without progress for so long, or for ten steps where steps are longer, is killed and started again. One
    # that idles tells of itself once a second.
    hang_timeout_s: float = Field(default=10.0, ge=2)

    @field_validator("block_size")
    @classmethod
    def _is_a_power_of_two(cls, block_size: int) -> int:
        if block_size & (block_size - 1):
            raise ValueError("a power of two is needed")
        return block_size

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "Deployment":
        least, most = self.scheduler.min_prefill_replicas, self.scheduler.max_prefill_replicas
        if most is not None and most < least:
            raise ConfigError(f"scheduler.max_prefill_replicas = {most}: at least min_prefill_replicas ({least})")
        return self

    @model_validator(mode="after")
    def _has_the_replicas_of_its_mode(self) -> "Deployment":
        for name, stage in (("prefill", self.prefill), ("decode", self.decode)):
            tp, pp, layers = stage.tensor_parallel_size, stage.pipeline_parallel_size, stage.pipeline_layers
            if len(stage.devices) % stage.num_ranks:
                raise ConfigError(
                    f"{name}.devices = {stage.devices}: one for each of the {tp} x {pp} ranks of every replica"
                    " (tensor_parallel_size x pipeline_parallel_size) is needed"
                )
            if layers is not None and len(layers) != pp:
                raise ConfigError(
                    f"{name}.pipeline_layers = {layers}: a number for each of pipeline_parallel_size = {pp} is needed"
                )
        if not self.decode.devices:
            raise ConfigError("decode.devices = []: a device for each replica is needed")
        if self.mode == "disaggregated" and not self.prefill.devices:
            raise ConfigError("prefill.devices = []: mode = disaggregated needs a device for each replica")
        if self.mode == "colocated" and self.prefill.devices:
            raise ConfigError(f"prefill.devices = {self.prefill.devices}: mode = colocated has decode.devices only")
        return self

    def stage(self, home: StageName) -> StageConfig:
        return self.prefill if home == "prefill" else self.decode

    def replicas(self) -> list[tuple[StageName, str, Role]]:
        """Home, devices (joined by commas) and first role of every replica, by its id."""
        role: Role = "mixed" if self.mode == "colocated" else "decode"
        return [("prefill", devices, "prefill") for devices in self.prefill.replicas] + [
            ("decode", devices, role) for devices in self.decode.replicas
        ]

    def num_places(self, home: StageName) -> int:
        """Sequences that a replica takes to decode: running, waiting and swapped."""
        return self.decode.num_places if home == "decode" else self.prefill.max_num_seqs

    @property
    def num_prompt_tokens_beside(self) -> int:
        """Prompt tokens of a step with running sequences."""
        if self.decode.local_prefill_tokens:
            return self.decode.local_prefill_tokens
        most = self.prefill.max_num_batched_tokens
        return most if self.scheduler.roles == "auto" else min(TOKENS_BESIDE, most)

    @classmethod
    def from_environment(cls) -> "Deployment":
        """The deployment of the file that the environment names. Raises ConfigError in one line."""
        path = os.environ.get(DEPLOYMENT_VARIABLE)
        if not path:
            raise ConfigError(f"{DEPLOYMENT_VARIABLE} is not set: it names the deployment file (YAML)")
        return cls.from_yaml(path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Deployment":
        """Reads and validates the file. Raises ConfigError in one line that names the field."""
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"deployment file {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"deployment file {path}: {' '.join(str(error).split())}") from None

    @classmethod
    def from_text(cls, text: str) -> "Deployment":
        """Of such a file. Raises ConfigError in one line that names the field, or YAMLError."""
        return cls.parse(yaml.safe_load(text))

    @classmethod
    def parse(cls, raw: Any) -> "Deployment":
        """Validates plain data. Raises ConfigError in one line that names the field."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "deployment"
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{field} = {first['input']!r}: {reason}") from None

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
