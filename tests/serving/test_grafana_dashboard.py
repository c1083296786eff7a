"""The dashboard shows what a server under load does: every expression of it has values, and they are right."""

import json
import math
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.serving.metric_families import FAMILIES
from tests.promql import Scrapes, Vector, samples
from tests.serving.clients import generate, read_metrics, run_streams, total
from tests.serving.deployments import deploy
from tests.serving.test_cancel import wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server
DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 8  # tokens, layers, keys and values, heads, head_dim, float64
NUM_REQUESTS, PROMPT_LEN, NUM_TOKENS = 24, 50, 60


def evaluated(expression: str, scrapes: Scrapes) -> Vector:
    """As Grafana sends it, all models chosen."""
    value = scrapes.value(expression.replace("$model_name", ".*").replace("$__rate_interval", "1m"))
    assert isinstance(value, dict)
    return value


def expressions(title: str) -> list[str]:
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    return [target["expr"] for target in panel["targets"]]


def scrape(server: TritonServer) -> tuple[float, str]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        return time.monotonic(), page.read().decode()


@pytest.fixture(scope="module")
def scrapes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrapes]:
    """Around a load that needs all there is: queues, hand-offs, a decode pool too small, a prefix cache, targets."""
    deployment = deploy(
        tiny_llama,
        prefill={"prefix_cache": True},
        decode={
            "policy": "mlfq",
            "quantum_s": 0.02,
            "kv_cache_bytes": 24 * BLOCK_BYTES,
            "host_kv_bytes": 400 * BLOCK_BYTES,
            "max_num_seqs": 8,
            "max_num_resident_seqs": 32,
        },
    )
    log_path = tmp_path_factory.mktemp("dashboard") / "log"
    with TritonServer(deployment, log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, input_ids=[3] * PROMPT_LEN, max_tokens=1)
        ended = "vllm:request_success_total"
        wait_until(lambda: total(read_metrics(server.metrics_url), ended) == 1, 10.0)
        then, before = scrape(server)
        asked: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "temperature": 0.0}
        asked |= {"input_ids": [3] * PROMPT_LEN, "ttft_target_ms": 60_000.0, "tpot_target_ms": 60_000.0}
        answers = run_streams(server.grpc_url, [asked] * NUM_REQUESTS, NUM_REQUESTS)
        assert all(answer.error is None for answer in answers)
        wait_until(lambda: total(read_metrics(server.metrics_url), ended) == NUM_REQUESTS + 1, 10.0)
        now, after = scrape(server)
        yield Scrapes(samples(before), samples(after), now - then)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_has_values(scrapes: Scrapes, expression: str) -> None:
    values = evaluated(expression, scrapes)
    assert values
    assert all(math.isfinite(value) and value >= 0 for value in values.values())


def test_rates_are_those_of_the_load(scrapes: Scrapes) -> None:
    def per_load(expression: str, **labels: str) -> float:
        return evaluated(expression, scrapes)[frozenset(labels.items())] * scrapes.seconds

    prompt, generation, as_it_comes = expressions("Tokens per second")
    assert per_load(prompt) == pytest.approx(NUM_REQUESTS * PROMPT_LEN)
    assert per_load(generation) == pytest.approx(NUM_REQUESTS * NUM_TOKENS)
    assert per_load(as_it_comes) == pytest.approx(NUM_REQUESTS * (NUM_TOKENS - 1))
    success, errors, _ = expressions("Requests per second")
    assert per_load(success, finished_reason="length") == pytest.approx(NUM_REQUESTS)
    assert not any(evaluated(errors, scrapes).values())
    preemptions, *_ = expressions("Preemptions, recoveries, role changes per second")
    assert per_load(preemptions, by="swap") >= 1
    assert per_load(expressions("Swapped")[0], direction="in") >= BLOCK_BYTES
    assert (
        per_load(expressions("KV handed off")[0], transport="cuda_ipc") >= NUM_REQUESTS * BLOCK_BYTES
    )  # the rest is cached there
    (attained,) = evaluated(expressions("SLO attainment")[0], scrapes).values()
    (hits,) = evaluated(expressions("Prefix cache hits")[0], scrapes).values()
    assert attained == 1.0 and hits > 0.5


@pytest.mark.parametrize("title", ["Time to first token", "Inter-token latency", "End to end", "Time of a KV copy"])
def test_quantiles_are_in_order(scrapes: Scrapes, title: str) -> None:
    p50, p90, p99 = (next(iter(evaluated(expression, scrapes).values())) for expression in expressions(title))
    assert 0 < p50 <= p90 <= p99


def test_every_metric_is_on_it_but_those_that_others_imply() -> None:
    shown = {name for name in FAMILIES if any(name in expression for expression in EXPRESSIONS)}
    assert set(FAMILIES) - shown == {
        "distserve:kv_blocks",
        "distserve:kv_blocks_free",
        "distserve:num_tokens_waiting",
        "distserve:replica_up",
        "distserve:requests_without_spans_total",
        "vllm:num_preemptions_total",
        "vllm:request_inference_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    }
