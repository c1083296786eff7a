"""What a load asks for, and what is computed from the records of a run."""

import json
import random
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from ensemble.errors import ConfigError
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import make_tiny_tokenizer
from tools.load.load import Load
from tools.load.prompts import one_token_pieces, random_text, token_ids
from tools.load.records import Record, Run, parse_targets
from tools.load.summary import summarize
from tools.load.workloads import Asked, Lengths, Workload, arrivals, read_trace


def record(due: float, times: list[float], tokens: list[int], output_len: int | None = None) -> Record:
    return Record(prompt_len=10, output_len=output_len or sum(tokens), due=due, sent=due, times=times, tokens=tokens)


def run_of(*records: Record, lag_p99_ms: float = 1.0) -> Run:
    return Run(load={}, lag_p99_ms=lag_p99_ms, max_lag_ms=25.0, client_cpu_share=0.1, records=list(records))


def test_prompts_have_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    tokenizer, rng = Tokenizer.from_dir(tmp_path), random.Random(0)
    pieces = one_token_pieces(tokenizer, rng)
    texts = [random_text(tokenizer, pieces, length, rng) for length in (2, 3, 10, 100, 500)]
    assert [len(tokenizer.encode(text)) for text in texts] == [2, 3, 10, 100, 500]


def test_prompts_that_share_hashes_share_their_beginning_and_no_more() -> None:
    first, second = (
        token_ids(Asked(Lengths(1500, 1), hash_ids=(7, 8, last)), 1000, random.Random(last)) for last in (1, 2)
    )
    assert len(first) == len(second) == 1500
    assert (first[:1024] == second[:1024]).all()
    assert (first[1024:] == second[1024:]).mean() < 0.1


@pytest.mark.parametrize(
    ("name", "prompt_len", "output_len"), [("chat", 755.5, 200.3), ("code", 171.3, 98.2), ("summary", 1738.3, 90.7)]
)
def test_applications_have_the_mean_lengths_of_distserves_paper(
    name: str, prompt_len: float, output_len: float
) -> None:
    lengths = [each.lengths for each in Workload(name).draw(4000, random.Random(0))]
    assert mean(each.prompt for each in lengths) == pytest.approx(prompt_len, rel=0.05)
    assert mean(each.output for each in lengths) == pytest.approx(output_len, rel=0.05)
    assert max(each.prompt + each.output for each in lengths) < 2048


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    """The coefficient of variation of gamma-distributed gaps is the shape to the power of minus a half."""
    gaps = np.diff(arrivals(20_000, 5.0, burstiness, random.Random(0)))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrivals(3, float("inf"), burstiness, random.Random(0)) == [0.0, 0.0, 0.0]


def test_traces_are_read_with_their_times(tmp_path: Path) -> None:
    azure, mooncake, custom = (tmp_path / name for name in ("azure.csv", "mooncake.jsonl", "custom.jsonl"))
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read_trace(azure)
    assert (first.lengths, second.lengths) == (Lengths(374, 44), Lengths(396, 109))
    assert (first.arrival_s, second.arrival_s) == (0.0, pytest.approx(4.314579, abs=1e-5))
    mooncake.write_text(json.dumps({"timestamp": 3000, "input_length": 9, "output_length": 4, "hash_ids": [1]}) + "\n")
    assert read_trace(mooncake) == [Asked(Lengths(9, 4), 0.0, hash_ids=(1,))]
    custom.write_text(json.dumps({"prompt": "Hello", "output_tokens": 3}) + "\n")
    assert read_trace(custom)[0].text == "Hello"


def test_what_is_no_trace_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("ContextTokens\n5\n")
    with pytest.raises(ConfigError, match="request 1 needs ContextTokens and GeneratedTokens"):
        read_trace(tmp_path / "trace.csv")
    with pytest.raises(ConfigError, match="--dataset-name chatter: must be one of random, chat"):
        Workload("chatter").draw(1, random.Random(0))
    with pytest.raises(ConfigError, match="--endpoint prefill: must be ensemble or scheduler"):
        Load(Workload(), 1, endpoint="prefill")


def test_a_load_is_the_same_for_every_server(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    load = Load(Workload("code", scale=0.1), 20, rate=3.0, endpoint="scheduler", seed=5)
    assert load.requests(tokenizer) == load.requests(tokenizer)


def test_figures_of_two_requests() -> None:
    run = run_of(
        record(0.0, [0.1, 0.2, 0.4], [1, 1, 1]),
        record(1.0, [1.4, 2.0], [1, 3]),
    )
    found = summarize(run, {"ttft": 200.0, "tpot": 160.0}, ("ttft", "tpot", "itl", "gap", "e2el"), (99,))
    assert found["duration"] == 2.0 and found["output_throughput"] == 3.5
    assert found["mean_ttft_ms"] == pytest.approx(250) and found["mean_tpot_ms"] == pytest.approx(175)  # 150 and 200
    assert found["mean_itl_ms"] == pytest.approx(300)  # 100, 200 and 600: gaps between responses, not tokens
    assert found["mean_gap_ms"] == pytest.approx(400) and found["median_e2el_ms"] == pytest.approx(700)
    assert found["slo_attainment"] == 0.5 and found["request_goodput"] == 0.5
    assert found["valid"] and not run_of(*run.records, lag_p99_ms=30.0).is_valid


def test_an_itl_target_is_for_the_longest_gap_unless_the_output_is_long() -> None:
    """One stall of a second counts for a short output; of 200 gaps it is half a per cent."""
    times = [0.01 * index for index in range(50)] + [1.5 + 0.01 * index for index in range(151)]
    short, long = record(0.0, times[:60], [1] * 60), record(0.0, times, [1] * 201)
    assert short.itl == pytest.approx(1.01) and long.itl == pytest.approx(0.01)
    assert not short.meets({"itl": 50.0}) and long.meets({"itl": 50.0}) and not long.meets({"gap": 50.0})


def test_a_request_that_failed_meets_no_target() -> None:
    failed, short = Record(prompt_len=1, output_len=1, due=0, sent=0, error="no"), record(0, [0.1], [1], output_len=2)
    assert run_of(failed, short, record(0, [0.1], [1])).attainment({"ttft": 1000.0}) == pytest.approx(1 / 3)


@pytest.mark.parametrize("wrong", ["ttft", "itls:5", "ttft:fast", "ttft:-1"])
def test_targets_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"--goodput {wrong}: must be"):
        parse_targets([wrong])
    assert parse_targets(["ttft:200", "itl:20 tpot:1.5"]) == {"ttft": 200.0, "itl": 20.0, "tpot": 1.5}
