"""Goodput of two modes, measured on the CPU: the runs, what is kept of them, and what is computed from that."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from tools.bench_goodput import deployment_of, file_of, measure, write
from tools.load.goodput import Goodput, Measured, curve_targets, goodput
from tools.load.load import Load
from tools.load.records import Record, Run
from tools.load.workloads import Workload
from tools.proofs.gpu_smoke import write_model_dir
from tools.server.tiny_server import TINY_MODEL


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 1.0), (2, 0.95), (4, 0.85), (8, 0.1)], Goodput(3.0)),
        ([(1, 1.0), (2, 0.5), (4, 0.95)], Goodput(1.2)),  # what comes after the first failure does not count
        ([(1, 0.7), (2, 0.95)], Goodput(1, "less than")),
        ([(1, 1.0), (2, 0.9)], Goodput(2, "at least")),
    ],
)
def test_goodput_is_where_the_share_falls_below_nine_tenths(points: list[Any], expected: Goodput) -> None:
    found = goodput(points)
    assert (found.rate, found.bound) == (pytest.approx(expected.rate), expected.bound)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model_dir(tmp_path / "model", TINY_MODEL)
    return tmp_path / "model"


def measured(gap_s: dict[float, float]) -> Measured:
    """At each rate all requests have gaps of so many seconds, and a TTFT of 0.1."""

    def run(gap: float) -> Run:
        records = [
            Record(prompt_len=1, output_len=3, due=0, sent=0, times=[0.1, 0.1 + gap, 0.1 + 2 * gap], tokens=[1, 1, 1])
        ]
        return Run(load={}, lag_p99_ms=0, max_lag_ms=25, client_cpu_share=0, records=records)

    return Measured("a", {rate: [run(gap)] for rate, gap in gap_s.items()})


def test_one_run_at_each_rate_answers_for_every_target() -> None:
    found = measured({1.0: 0.01, 2.0: 0.02, 4.0: 0.04})
    assert found.goodput({"itl": 5.0}) == Goodput(1.0, "less than")
    assert found.goodput({"itl": 15.0}).rate == pytest.approx(1.1)  # a tenth of the way from all to none
    assert found.goodput({"itl": 30.0}).rate == pytest.approx(2.2)
    assert found.goodput({"itl": 50.0}) == Goodput(4.0, "at least")
    assert found.goodput({"itl": 50.0, "ttft": 99.0}) == Goodput(1.0, "less than")
    assert min(curve_targets([found], "itl")) >= 10 and max(curve_targets([found], "itl")) <= 40


def test_what_is_no_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode = 'together'"):
        deployment_of("together", "cpu,cpu", {"model.path": "/nowhere"})
    with pytest.raises(ConfigError, match="--modes colocated:many"):
        deployment_of("colocated:many", "cpu,cpu", {"model.path": "/nowhere"})


@pytest.mark.server
def test_both_modes_are_measured_and_never_twice(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {
        "model.path": model,
        "model.load_format": "dummy",
        "prefill.kv_cache_bytes": 32 << 20,
        "decode.kv_cache_bytes": 32 << 20,
    }
    deployments = {mode: deployment_of(mode, "cpu,cpu", common) for mode in ("disaggregated", "colocated:64")}
    assert deployments["colocated:64"].decode.local_prefill_tokens == 64
    assert deployments["colocated:64"].decode.devices == ["cpu", "cpu"]
    loads = [Load(Workload(input_len=16, output_len=8), 6, rate=rate) for rate in (10.0, 20.0)]
    out, console = tmp_path / "out", Console(quiet=True)
    first, missing = measure(out, deployments, loads, 1, 10_000.0, console)
    assert not missing and [each.mode for each in first] == ["disaggregated", "colocated:64"]
    assert all(len(run.completed) == 6 for each in first for runs in each.runs.values() for run in runs)
    assert first[0].phases(10.0)["handoff"] > 0 and first[1].phases(10.0)["handoff"] == 0

    def no_server(*arguments: Any) -> Any:
        raise AssertionError("a run that is on disk is run again")

    monkeypatch.setattr("tools.bench_goodput.server_of", no_server)
    again, missing = measure(out, deployments, loads, 1, 10_000.0, console)
    assert not missing and again == first
    other = [Load(Workload(input_len=17, output_len=8), 6, rate=10.0)]
    with pytest.raises(ConfigError, match="another input_len"):
        measure(out, deployments, other, 1, 10_000.0, console)
    file_of(out, "disaggregated", loads[0]).unlink()
    with pytest.raises(AssertionError, match="is run again"):
        measure(out, deployments, loads, 1, 10_000.0, console)
    write(out, tmp_path / "figures.json", first, {"ttft": 60_000.0, "itl": 60_000.0}, "itl")
    assert (out / "goodput.png").stat().st_size > 10_000 and (out / "phases.png").stat().st_size > 10_000
    assert "colocated:64: goodput at 90%" in (tmp_path / "figures.json").read_text()


def test_roles_are_fixed_but_for_auto(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.server.deployment.count_gpus", lambda: 2)  # where make serve takes auto
    modes = [deployment_of(mode, "cpu,cpu", {"model.path": model}) for mode in ("disaggregated", "auto", "colocated")]
    assert [mode.scheduler.roles for mode in modes] == ["fixed", "auto", "fixed"]


def test_auto_is_told_the_targets(model: Path) -> None:
    auto = deployment_of("auto", "cpu,cpu", {"model.path": model, "scheduler.itl_target_ms": 20.0})
    assert (auto.scheduler.roles, auto.scheduler.itl_target_ms, auto.mode) == ("auto", 20.0, "disaggregated")


def test_a_deployment_file_is_a_mode(tmp_path: Path, model: Path) -> None:
    deployment = Deployment.parse(
        {"mode": "colocated", "model": {"path": str(model)}, "decode": {"devices": ["cpu"], "max_num_seqs": 7}}
    )
    (tmp_path / "planned.yaml").write_text(deployment.to_yaml())
    assert deployment_of(str(tmp_path / "planned.yaml"), None, {}).decode.max_num_seqs == 7
