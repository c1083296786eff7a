"""A load put on a server, and the run that comes of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ensemble.errors import ConfigError
from ensemble.tokenizer import Tokenizer
from tools.load.client import drive, prepare
from tools.load.client_process import Prepared
from tools.load.prompts import one_token_pieces, random_text, token_ids
from tools.load.records import Run
from tools.load.workloads import Asked, Workload, arrivals

Endpoint = Literal["ensemble", "scheduler"]  # text to the first, exact ids to the second
MAX_LAG_MS = 25.0  # of the client, P99


@dataclass(frozen=True, slots=True)
class Load:
    workload: Workload
    num_prompts: int
    rate: float = float("inf")  # requests a second
    burstiness: float = 1.0
    trace_speed: float | None = None  # arrivals as the trace has them, so many times as fast
    max_concurrency: int | None = None
    endpoint: str = "ensemble"  # an Endpoint
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.endpoint not in get_args(Endpoint):
            raise ConfigError(f"--endpoint {self.endpoint}: must be {' or '.join(get_args(Endpoint))}")

    def requests(self, tokenizer: Tokenizer, max_model_len: int | None = None) -> list[Prepared]:
        """In the order of their arrivals. Raises ConfigError."""
        rng = random.Random(self.seed)
        asked = self.workload.draw(self.num_prompts, rng)
        due = self._arrivals(asked, rng)
        pieces = one_token_pieces(tokenizer, rng) if self.endpoint == "ensemble" else []
        prepared = []
        for index, each in enumerate(asked):
            prompt, prompt_len = self._prompt(each, tokenizer, pieces, rng)
            output_len = each.lengths.output
            if max_model_len is not None and prompt_len + output_len > max_model_len:
                raise ConfigError(
                    f"request {index}: {prompt_len} tokens of prompt and {output_len} of output, but the model's "
                    f"length is {max_model_len}; --scale makes all lengths shorter"
                )
            prepared.append(prepare(self.endpoint, prompt, output_len, due[index], prompt_len))
        return sorted(prepared, key=lambda request: request.due)

    def describe(self) -> dict[str, str | int | float | None]:
        """Under vLLM's names, where it has them."""
        return {
            "endpoint": self.endpoint,
            "dataset_name": self.workload.name,
            "dataset_path": self.workload.path.name if self.workload.path else None,
            "input_len": self.workload.input_len,
            "output_len": self.workload.output_len,
            "range_ratio": self.workload.range_ratio,
            "scale": self.workload.scale,
            "num_prompts": self.num_prompts,
            "request_rate": "inf" if self.rate == float("inf") else self.rate,
            "burstiness": self.burstiness,
            "trace_speed": self.trace_speed,
            "max_concurrency": self.max_concurrency,
            "seed": self.seed,
        }

    def _arrivals(self, asked: list[Asked], rng: random.Random) -> list[float]:
        if self.trace_speed is None:
            return arrivals(len(asked), self.rate, self.burstiness, rng)
        times = [each.arrival_s for each in asked]
        if any(each is None for each in times):
            raise ConfigError(
                f"--trace-speed {self.trace_speed:g}: {len(asked)} requests with a time of their own are needed"
            )
        return [float(each or 0.0) / self.trace_speed for each in times]

    def _prompt(
        self, asked: Asked, tokenizer: Tokenizer, pieces: list[str], rng: random.Random
    ) -> tuple[str | np.ndarray[tuple[int], np.dtype[np.int32]], int]:
        if self.endpoint == "scheduler":
            if asked.text is None:
                ids = token_ids(asked, tokenizer.vocab_size, rng)
            else:
                ids = np.array(tokenizer.encode(asked.text), np.int32)
            return ids, len(ids)
        if asked.text is None and asked.hash_ids:
            raise ConfigError("--endpoint ensemble: hash_ids need exact ids, so --endpoint scheduler")
        text = asked.text or random_text(tokenizer, pieces, asked.lengths.prompt, rng)
        return text, len(tokenizer.encode(text))


def put(
    url: str,
    load: Load,
    requests: list[Prepared],
    *,
    num_processes: int,
    num_warmups: int = 0,
    max_lag_ms: float = MAX_LAG_MS,
    keep_text: bool = False,
    on_done: Callable[[int], None] = lambda number: None,
) -> Run:
    """Sends the load's `requests`; first `num_warmups` of them, which do not count. Raises LoadError."""
    outcome = drive(
        url,
        requests,
        num_processes=num_processes,
        max_concurrency=load.max_concurrency,
        timeout_s=load.timeout_s,
        num_warmups=num_warmups,
        keep_text=keep_text,
        on_done=on_done,
    )
    return Run(
        load=load.describe(),
        lag_p99_ms=1e3 * float(np.percentile(outcome.lags, 99)) if outcome.lags else 0.0,
        max_lag_ms=max_lag_ms,
        client_cpu_share=outcome.cpu_share,
        records=outcome.records,
    )
