"""What judges a run on four GPUs: fleets as they are asked for, and outputs that must not pass for equal."""

import subprocess
from itertools import product

import msgspec
import pytest

from tools.load.goodput import Goodput
from tools.offline import generate
from tools.proofs import handoffs
from tools.proofs.four_gpus import FLEETS
from tools.proofs.gpu_smoke import Comparison, compare, make_requests, write_model_dir
from tools.proofs.planned_goodput import CASES, PLANS, RESOLUTION, deployment_for, heading, plan_files, search, verdict
from tools.proofs.soak_swaps import load
from tools.server.tiny_server import TINY_MODEL

DEVICES = [f"cuda:{index}" for index in range(4)]


def test_every_fleet_has_all_devices_each_once(tmp_path):
    for fleet in FLEETS:
        deployment = fleet.deployment({"path": tmp_path}, DEVICES)
        assert [*deployment.prefill.devices, *deployment.decode.devices] == DEVICES, fleet.name
    pipeline = FLEETS[-1].deployment({"path": tmp_path}, DEVICES)
    assert (pipeline.prefill.pipeline_parallel_size, pipeline.decode.tensor_parallel_size) == (2, 2)
    assert [home for home, _, _ in FLEETS[2].deployment({"path": tmp_path}, DEVICES).replicas()] == [
        "prefill",
        "decode",
        "decode",
    ]


def test_only_tokens_that_are_nearly_the_best_count_as_near_ties(tmp_path):
    write_model_dir(tmp_path / "model", TINY_MODEL)
    engine = load({"path": tmp_path / "model", "dtype": "float32", "load_format": "dummy"})
    [request] = make_requests(1, TINY_MODEL["vocab_size"], 4)
    sampling = msgspec.structs.replace(request.sampling, num_logprobs=3)
    alone = generate(engine, [msgspec.structs.replace(request, sampling=sampling)])
    output, last = alone[0].output_token_ids, alone[0].last_log_probs
    assert last is not None
    best, second, third = last.top_token_ids
    to_second, to_third = (last.top_log_probs[0] - each for each in last.top_log_probs[1:])
    near_tie = (to_second + to_third) / 2

    def judged(tokens: list[int]) -> Comparison:
        return compare(engine, [request], alone, [tokens], near_tie)

    assert best == output[3]
    assert judged(output) == Comparison(1, [], [])
    [gap] = judged([*output[:3], second]).tie_margins
    assert gap == pytest.approx(to_second, abs=1e-4)
    for wrong in ([*output[:3], third], output[:3], []):
        found = judged(wrong)
        assert (found.num_equal, found.tie_margins, len(found.faults)) == (0, [], 1)


@pytest.mark.parametrize("first", [5.0, 36.9, 37.1, 200.0])
def test_rates_close_in_on_the_goodput_from_either_side(first):
    asked: list[float] = []

    def attainment(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= 37.0 else 0.7

    points = search(attainment, first, lambda: True)
    assert sorted(points) == sorted(asked)
    low, high = (pick(rate for rate in points if points[rate] == share) for pick, share in ((max, 1.0), (min, 0.7)))
    assert low <= 37.0 < high <= RESOLUTION * low
    assert len(search(attainment, first, lambda: False)) == 1
    assert len(search(lambda rate: None if rate != first else 1.0, first, lambda: True)) == 1


def test_the_plans_that_are_kept_are_the_planners_for_four_gpus(tmp_path):
    write_model_dir(tmp_path / "model", TINY_MODEL)
    for name, gpu in product(CASES, ("h100", "h200")):
        files = plan_files(name, PLANS, gpu, tmp_path)
        rates = [heading(file)[1] for file in files]
        assert rates == sorted(rates, reverse=True), "the choice is the best"
        for file in files:
            planned = deployment_for(str(file), tmp_path / "model", ["cpu"] * 4)
            assert len(planned.prefill.devices + planned.decode.devices) <= 4
            assert planned.model.path == tmp_path / "model" and planned.model.load_format == "dummy"


@pytest.mark.parametrize(
    ("choice", "best", "is_met"),
    [
        (Goodput(97.0), Goodput(100.0), True),
        (Goodput(96.0), Goodput(100.0), False),
        (Goodput(120.0, "at least"), Goodput(100.0), True),
        (Goodput(100.0), Goodput(90.0, "at least"), False),
        (Goodput(100.0, "less than"), Goodput(90.0), False),
    ],
)
def test_a_goodput_that_is_only_a_bound_meets_no_goal_that_it_may_miss(choice, best, is_met):
    assert verdict("a choice", choice, best)["met"] is is_met


def test_an_answer_is_heard_that_comes_together_with_a_stale_one(monkeypatch):
    """As after a pair of which the other reader failed. What lies in a buffer, nothing shows that watches the pipe."""
    popen, answers = subprocess.Popen, '{"number": 1, "time": 1.0}\\n{"number": 2, "time": 2.0}\\n'
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **how: popen(["sh", "-c", f"read x; read x; printf '{answers}'; cat"], **how)
    )
    monkeypatch.setattr(handoffs, "ANSWER_S", 5.0)
    with handoffs.ReaderProcess("cpu") as reader:
        reader.send("prepare")
        reader.send("close")
        assert reader.heard() == 2.0
