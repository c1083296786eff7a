"""What is asked of a server, and when: lengths by name or from a file, arrivals at a rate.

    random       --input-len and --output-len, each +- --range-ratio
    chat         like ShareGPT: prompts 755 on average, outputs 200, below 2,048 together, as in DistServe's paper
    code         like HumanEval: 171 and 98
    summary      like LongBench, cut to 2,040 together: 1,740 and 90
    trace        CSV with the Azure traces' columns; JSONL with lengths (Mooncake's traces) or prompts (vLLM's custom)

The drawn ones are log-normal; nothing of the datasets themselves is in them.
"""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ensemble.errors import ConfigError

CSV_COLUMNS = "ContextTokens", "GeneratedTokens"  # those of the Azure LLM inference traces
HASH_BLOCK_TOKENS = 512  # of a `hash_ids` element in Mooncake's traces
DATASETS = ("random", "chat", "code", "summary", "trace")
ALIASES = {"sharegpt": "chat", "humaneval": "code", "longbench": "summary", "custom": "trace", "azure": "trace"}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a request, in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A request before it has a prompt."""

    lengths: Lengths
    arrival_s: float | None = None  # as the trace has it, from its first request
    text: str | None = None  # the prompt, where the file has one; its length is then known to the tokenizer alone
    hash_ids: tuple[int, ...] = ()  # prompts that begin with the same ids begin with the same tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Which requests: everything that a name or a file leaves open."""

    name: str = "random"
    path: Path | None = None
    input_len: int = 512
    output_len: int | None = None  # also replaces the outputs of other workloads
    range_ratio: float = 0.0
    scale: float = 1.0  # of all lengths, for small models

    def draw(self, num_prompts: int, rng: random.Random) -> list[Asked]:
        """`num_prompts` requests; of a trace its first ones, over again where it is shorter. Raises ConfigError."""
        name = ALIASES.get(self.name, self.name)
        if name not in DATASETS:
            known = ", ".join([*DATASETS, *ALIASES])
            raise ConfigError(f"--dataset-name {self.name}: must be one of {known}")
        if (name == "trace") != (self.path is not None):
            raise ConfigError(f"--dataset-path {self.path}: goes with --dataset-name trace, and that with it")
        if self.path is not None:
            read = read_trace(self.path)
            asked = [read[index % len(read)] for index in range(num_prompts)]
            if len(read) < num_prompts:  # their times are not those of one trace any more
                asked = [replace(each, arrival_s=None) for each in asked]
        else:
            asked = [Asked(self._lengths(name, rng)) for _ in range(num_prompts)]
        return [replace(each, lengths=self._scaled(each.lengths)) for each in asked]

    def _lengths(self, name: str, rng: random.Random) -> Lengths:
        match name:
            case "chat":
                return _log_normal(rng, 6.65, 0.8, 5.02, 0.85)
            case "code":
                return _log_normal(rng, 5.06, 0.4, 4.3, 0.75)
            case "summary":
                output = max(1, min(1024, round(rng.lognormvariate(4.0, 1.0))))
                prompt = rng.randint(1900, 2047) if rng.random() < 0.82 else round(rng.lognormvariate(6.8, 0.5))
                return Lengths(max(1, min(2040 - output, prompt)), output)
        return Lengths(self._near(self.input_len, rng), self._near(self.output_len or 128, rng))

    def _near(self, length: int, rng: random.Random) -> int:
        low, high = round(length * (1 - self.range_ratio)), round(length * (1 + self.range_ratio))
        return rng.randint(max(1, low), max(1, high))

    def _scaled(self, lengths: Lengths) -> Lengths:
        is_random = self.name == "random"
        output = lengths.output if self.output_len is None or is_random else self.output_len
        return Lengths(max(1, round(lengths.prompt * self.scale)), max(1, round(output * self.scale)))


def _log_normal(rng: random.Random, prompt_mu: float, prompt_sigma: float, mu: float, sigma: float) -> Lengths:
    """By DistServe's rule for ShareGPT: below 2,048 together, and not both below 4."""
    while True:
        prompt, output = round(rng.lognormvariate(prompt_mu, prompt_sigma)), round(rng.lognormvariate(mu, sigma))
        if min(prompt, output) >= 1 and max(prompt, output) >= 4 and prompt + output < 2048:
            return Lengths(prompt, output)


def read_trace(path: Path) -> list[Asked]:
    """Raises ConfigError, which names the line."""
    lines = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: Iterator[dict[str, Any]] = (
                (json.loads(line) for line in file if line.strip()) if path.suffix == ".jsonl" else csv.DictReader(file)
            )
            asked = []
            for lines, row in enumerate(rows, start=1):  # noqa: B007
                asked.append(_of_json(row) if path.suffix == ".jsonl" else _of_csv(row))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        wanted = "input_length and output_length, or prompt" if path.suffix == ".jsonl" else " and ".join(CSV_COLUMNS)
        raise ConfigError(f"--dataset-path {path}: request {lines or 1} needs {wanted}: {error!r}") from None
    if not asked:
        raise ConfigError(f"--dataset-path {path}: there is no request in it")
    first = next((each.arrival_s for each in asked if each.arrival_s is not None), None)
    return [
        Asked(
            each.lengths, None if each.arrival_s is None else each.arrival_s - (first or 0.0), each.text, each.hash_ids
        )
        for each in asked
    ]


def _of_csv(row: dict[str, Any]) -> Asked:
    time = row.get("TIMESTAMP") or row.get("timestamp")
    lengths = Lengths(*(max(1, int(row[column])) for column in CSV_COLUMNS))
    return Asked(lengths, None if not time else _seconds(time))


def _of_json(row: dict[str, Any]) -> Asked:
    """Mooncake's members, with milliseconds; or those of vLLM's custom dataset."""
    output = max(1, int(row.get("output_length") or row.get("output_tokens") or 128))
    if "prompt" in row:
        return Asked(Lengths(1, output), text=str(row["prompt"]))
    time = row.get("timestamp")
    hash_ids = tuple(int(each) for each in row.get("hash_ids") or ())
    lengths = Lengths(max(1, int(row["input_length"])), output)
    return Asked(lengths, None if time is None else float(time) / 1e3, hash_ids=hash_ids)


def _seconds(time: str) -> float:
    """Of a number of seconds, or of a date, whose 7 decimals Python does not read."""
    try:
        return float(time)
    except ValueError:
        date, _, fraction = time.partition(".")
        return datetime.fromisoformat(date).timestamp() + float(f"0.{fraction or 0}")


def arrivals(num_prompts: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds at which requests come. Gaps are gamma-distributed as `vllm bench serve` has them.

    rate: requests a second; infinity: all come at once. burstiness: the shape; 1 is a Poisson process, less is
    burstier, more is steadier.
    """
    if rate == float("inf"):
        return [0.0] * num_prompts
    times, now = [], 0.0
    for _ in range(num_prompts):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return times
