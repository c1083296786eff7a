"""What judges a run on four GPUs: fleets as they are asked for, and outputs that must not pass for equal."""

import msgspec
import pytest

from tools.offline import generate
from tools.proofs.four_gpus import FLEETS
from tools.proofs.gpu_smoke import Comparison, compare, make_requests, write_model_dir
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
