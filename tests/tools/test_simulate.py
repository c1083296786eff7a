"""Virtual time: what follows from the predicted steps alone is compared with what queueing theory and sums say."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import pytest

from ensemble.config import Deployment
from ensemble.models.spec import load_model_spec
from ensemble.scheduling.estimator import StepShape, TimedStep
from ensemble.scheduling.placement import Site, Work
from tools.benchmarks.engine_shapes import SHAPES
from tools.benchmarks.simulate_goodput import LOADS, OPT_13B, Load, Runs, itl
from tools.load.records import Record, Run
from tools.load.workloads import arrivals
from tools.proofs.gpu_smoke import write_model_dir
from tools.simulation.against_runs import compare
from tools.simulation.costs import (
    GPUS,
    Costs,
    ModelSize,
    SideCosts,
    kv_tokens,
    predicted_costs,
    predicted_steps,
    step_s,
)
from tools.simulation.noise import draw
from tools.simulation.simulator import Ask, Simulation

LLAMA_2_13B = ModelSize(40, 5120, 40, 40, 128, 12_850_000_000, 2)


def costs(**changes: Any) -> Costs:
    """A step takes 1 ms, a prompt's token 1, a sequence 1.2: simple enough to be summed by hand."""
    shapes = [StepShape.of([], [length] * size) for size in (1, 2, 4, 8, 16, 32) for length in (16, 400)]
    shapes += [StepShape.of([(0, length)], []) for length in (16, 32, 64, 128, 256)]
    steps = [TimedStep(shape, 1e-3 * (1 + shape.num_prompt_tokens + 1.2 * shape.num_rows)) for shape in shapes]
    plain = Costs(steps=steps, kv_token_bytes=1000, num_kv_tokens=64_000, runs_ahead=False)
    plain = msgspec.structs.replace(plain, control_s=0.0, front_s=0.0, back_s=0.0, pull_base_s=0.0)
    return msgspec.structs.replace(plain, pull_bytes_per_s=1e12, **changes)


def deployment(mode: str = "disaggregated", **changes: Any) -> Deployment:
    raw: dict[str, Any] = {
        "mode": mode,
        "model": {"path": "/nowhere"},
        "prefill": {"devices": [] if mode == "colocated" else ["cpu"]},
        "decode": {"devices": ["cpu"]},
    }
    for section, fields in changes.items():
        raw[section] = {**raw.get(section, {}), **fields}
    return Deployment.parse(raw)


def gaps_of(record: Record) -> list[float]:
    return [1e3 * gap for gap in record.gaps]


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_a_request_alone_takes_its_steps(mode: str) -> None:
    (record,) = Simulation(deployment(mode), costs()).run([Ask(0.5, 100, 6)])
    assert record.num_tokens == 6 and record.is_complete
    if mode == "colocated":
        assert 1e3 * record.ttft == pytest.approx(101, rel=0.02)
    assert record.times[-1] - record.due == pytest.approx(0.101 + 5 * 0.0022, rel=0.02)
    assert gaps_of(record)[-3:] == pytest.approx([2.2] * 3, rel=0.05)


def test_what_time_a_copy_takes_delays_the_first_token() -> None:
    """It is held until the sequence has joined: 100 tokens in 7 blocks of 16,000 bytes at 1 MB/s, 0.112 s."""
    fast, slow = (
        Simulation(deployment(), costs_).run([Ask(0.0, 100, 6)])[0].ttft
        for costs_ in (costs(), msgspec.structs.replace(costs(), pull_bytes_per_s=1e6))
    )
    assert slow - fast == pytest.approx(0.112, rel=0.02)


def test_prompts_wait_as_in_an_m_d_1_queue() -> None:
    """One prompt a step, Poisson arrivals, half of the time busy: a wait of S / 2 on average."""
    alone = deployment("colocated", prefill={"max_num_batched_tokens": 64}, scheduler={"max_wait_s": 1000})
    step = 0.065
    rng = random.Random(0)
    asks = [Ask(due, 64, 1) for due in arrivals(2000, 0.5 / step, 1.0, rng)]
    records = Simulation(alone, costs()).run(asks)
    assert mean(record.ttft for record in records) == pytest.approx(1.5 * step, rel=0.07)


def test_all_requests_end_also_where_sequences_are_swapped() -> None:
    """A pool of 40 blocks, and all swapping in virtual time."""
    tight = msgspec.structs.replace(costs(), num_kv_tokens=640, swap_bytes_per_s=1e9)
    swapping = deployment(decode={"policy": "mlfq", "host_kv_bytes": 4_000_000, "quantum_s": 0.05})
    simulation = Simulation(swapping, tight)
    records = simulation.run([Ask(0.01 * index, 48, 120) for index in range(24)])
    assert all(record.is_complete and record.num_tokens == 120 for record in records)
    assert simulation.num_swapped_out > 0
    while simulation.step():
        pass
    for replica in simulation.replicas.values():
        assert replica.loop.is_empty and replica.loop.num_free_blocks == replica.num_blocks


def test_a_shared_prefix_is_computed_once() -> None:
    cached = deployment("colocated", prefill={"prefix_cache": True})
    first, second = Simulation(cached, costs()).run([Ask(0.0, 200, 2, 160, 7), Ask(1.0, 200, 2, 160, 7)])
    assert first.ttft == pytest.approx(0.201, rel=0.02)
    assert second.ttft == pytest.approx(0.041, rel=0.05)
    again = Simulation(cached, costs()).run([Ask(0.0, 160, 2, 160, 7), Ask(1.0, 160, 2, 160, 7)])[1]
    assert again.ttft == pytest.approx(0.002, rel=0.05)  # of a prompt that is there whole the last token alone


def test_a_simulation_is_the_same_each_time() -> None:
    asks = [Ask(due, 50, 20) for due in arrivals(50, 20.0, 1.0, random.Random(3))]
    assert Simulation(deployment(), costs()).run(asks) == Simulation(deployment(), costs()).run(asks)


def test_what_is_not_predicted_is_drawn_by_the_seed_and_learnt() -> None:
    """Steps of one to two times what is predicted: 1.5 times on average, and the estimator knows most of it then."""
    noisy = msgspec.structs.replace(costs(), step_ratios=[(0.0, 1.0), (1.0, 2.0)])
    mixed = deployment("colocated", decode={"local_prefill_tokens": 16})
    asks = [Ask(due, 64, 40) for due in arrivals(60, 12.0, 1.0, random.Random(3))]
    first, again = Simulation(mixed, noisy), Simulation(mixed, noisy)
    records = first.run(asks)
    assert records == again.run(asks)
    assert records != Simulation(mixed, noisy, seed=1).run(asks)
    assert 1.1 < first.replicas[0].loop.estimator.overrun <= 1.3
    (alone,) = Simulation(mixed, noisy).run([Ask(0.0, 16, 400)])
    assert mean(gaps_of(alone)) == pytest.approx(1.5 * 2.2, rel=0.05)
    assert max(gaps_of(alone)) > 1.3 * mean(gaps_of(alone))


def test_responses_pass_a_sender_one_by_one_and_tokens_gather_behind_them() -> None:
    """Eight streams with a token every 10.6 ms each, four senders, 8 ms for a response: each has one every 16."""
    slow = msgspec.structs.replace(costs(), response_s=[(0.0, 8e-3), (1.0, 8e-3)])
    records = Simulation(deployment("colocated"), slow).run([Ask(0.0, 16, 200) for _ in range(8)])
    assert all(record.num_tokens == 200 for record in records)
    busy = [gap for record in records for gap in gaps_of(record)[10:-10]]
    assert mean(busy) == pytest.approx(16.0, rel=0.02) and min(busy) > 15.9
    assert {number for record in records for number in record.tokens[10:-10]} <= {1, 2}
    ends = [record.times[-1] for record in Simulation(deployment("colocated"), costs()).run([Ask(0.0, 16, 200)] * 8)]
    assert max(record.times[-1] for record in records) == pytest.approx(max(ends), abs=0.03)


def test_tokens_of_a_step_share_their_way_to_the_senders() -> None:
    late = msgspec.structs.replace(costs(), out_s=[(0.0, 0.0), (1.0, 2e-3)])
    first, second = Simulation(deployment("colocated"), late).run([Ask(0.0, 16, 100) for _ in range(2)])
    assert first.num_tokens == second.num_tokens == 100
    assert len(set(first.times[2:]) ^ set(second.times[2:])) <= 4  # but for steps without the other
    gaps = gaps_of(first)[5:-5]
    assert mean(gaps) == pytest.approx(3.4, rel=0.02) and max(gaps) > 4.5 and min(gaps) < 2.3


def test_drawn_values_are_those_of_the_distribution() -> None:
    rng = random.Random(0)
    drawn = sorted(draw([(0.0, 1.0), (0.5, 2.0), (0.99, 3.0), (1.0, 50.0)], rng) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(2.0, rel=0.02) and drawn[19_800] == pytest.approx(3.0, rel=0.05)
    assert drawn[0] >= 1.0 and 40.0 < drawn[-1] <= 50.0


def test_a_run_of_a_slower_machine_is_met_by_calibration() -> None:
    """ "Real" runs whose steps take 1.4 times as long, and whose front takes 30 ms more."""
    real = msgspec.structs.replace(costs().scaled(1.4), front_s=0.030)

    def run(rate: float) -> Run:
        asks = [Ask(due, 50, 20) for due in arrivals(60, rate, 1.0, random.Random(1))]
        records = Simulation(deployment(), real).run(asks)
        return Run(load={"request_rate": rate}, lag_p99_ms=0, max_lag_ms=1, client_cpu_share=0, records=records)

    modes = [("disaggregated", deployment(), [run(2.0), run(8.0)])]
    compared, found = compare(modes, lambda _: SideCosts(costs(), costs()), calibrate=True, seeds=2)
    assert [len(each.simulated) for each in compared] == [120, 120]
    assert costs().front_s + found.front_s == pytest.approx(0.030, abs=0.002)
    assert found.factor == pytest.approx(1.4, rel=0.03)
    for each in compared:
        for metric, percent in (("ttft", 50), ("ttft", 90), ("tpot", 90)):
            real_ms, simulated_ms = each.percentile_ms(metric, percent)
            assert simulated_ms == pytest.approx(real_ms, rel=0.03)


def test_each_side_is_predicted_by_its_own_degrees(tmp_path: Path) -> None:
    write_model_dir(tmp_path / "model", SHAPES["LLaMA-2-13B"].config)
    raw = {
        "model": {"path": str(tmp_path / "model")},
        "prefill": {"devices": ["cuda:0"]},
        "decode": {"devices": ["cuda:1", "cuda:2"], "tensor_parallel_size": 2},
        "block_size": 64,
    }
    spec = load_model_spec(tmp_path / "model")
    apart = predicted_costs(spec, GPUS["h100"], Deployment.parse(raw))
    prompt = StepShape.of([(0, 2048)], [])
    assert 1.6 < apart.prefill.times.seconds(prompt) / apart.decode.times.seconds(prompt) < 1.9
    assert apart.decode.num_kv_tokens > 2 * apart.prefill.num_kv_tokens
    raw["decode"] = {"devices": ["cuda:1", "cuda:2"], "pipeline_parallel_size": 2}
    piped = predicted_costs(spec, GPUS["h100"], Deployment.parse(raw))
    assert piped.decode.times.seconds(prompt) == pytest.approx(piped.prefill.times.seconds(prompt) / 2)
    colocated = raw | {"mode": "colocated", "prefill": {"devices": []}}
    small = replace(GPUS["h100"], memory_bytes=24 << 30)  # too little for the weights on one
    assert predicted_costs(spec, small, Deployment.parse(colocated)).decode.num_kv_tokens > 0


@pytest.mark.parametrize(
    ("chunk", "context_lens", "measured_ms"),
    [
        ((1024, 510), [2000] * 2, 26.5),
        ((1024, 504), [2000] * 8, 29.7),
        ((1024, 254), [2000] * 2, 14.5),
        ((0, 512), [], 23.0),
        ((0, 1024), [], 46.1),
        ((0, 0), [544], 9.56),
        ((0, 0), [544] * 32, 14.9),
        ((0, 0), [544] * 64, 19.8),
    ],
)
def test_predicted_steps_are_those_measured_on_an_h100(
    chunk: tuple[int, int], context_lens: list[int], measured_ms: float
) -> None:
    """The tables of docs/results/README.md, of LLaMA-2-13B (mixed steps) and OPT-13B, which has as many weights."""
    shape = StepShape.of([chunk] if chunk[1] else [], context_lens)
    assert 1e3 * step_s(LLAMA_2_13B, GPUS["h100"], shape, 1) == pytest.approx(measured_ms, rel=0.07)


def test_the_estimator_fits_predicted_steps() -> None:
    steps = predicted_steps(LLAMA_2_13B, GPUS["h100"], 1, 2048, 4096)
    fitted = Costs(steps=steps, kv_token_bytes=1, num_kv_tokens=1).estimator()
    for shape in (StepShape.of([(0, 2000)], []), StepShape.of([], [700] * 40), StepShape.of([(500, 256)], [900] * 20)):
        assert fitted.seconds(shape) == pytest.approx(step_s(LLAMA_2_13B, GPUS["h100"], shape, 1), rel=0.08)
    assert 40_000 < kv_tokens(LLAMA_2_13B, GPUS["h100"], 1, 0.9) < 70_000


def test_a_deployment_file_of_other_devices_is_simulated(tmp_path: Path) -> None:
    both = deployment("colocated", decode={"devices": [f"cuda:{index}" for index in range(4)]})
    records = Simulation(both, costs()).run([Ask(0.001 * index, 64, 4) for index in range(8)])
    assert max(record.ttft for record in records) < 3 * 0.065 + 0.05  # two each, not eight in a row


def test_goodput_is_found_between_what_is_attained_and_what_is_not() -> None:
    """Prompts of one token's answer, each alone in its step: below what two replicas can compute at all."""
    load = Load("", LLAMA_2_13B, (1949, 1949), (1, 1), (2.0, 60.0), (itl(20.0),))
    capacity = 2 / step_s(LLAMA_2_13B, GPUS["h100"], StepShape.of([(0, 1949)], []), 1)
    (found,) = Runs(load, "colocated:2048", 600, range(1)).goodputs()
    assert 0.7 * capacity < found < 1.15 * capacity  # 600 requests are over before the queue is too long
    assert Runs(load, "colocated:2048", 40, range(1)).throughput() == pytest.approx(capacity, rel=0.1)


def test_what_is_predicted_of_a_pipeline_is_what_its_steps_in_flight_take() -> None:
    """Nine sequences in three places: three in a step, and one token every three steps; a prompt's chunks stream."""
    places = {"devices": ["cpu"] * 3, "pp": 3}
    piped = deployment("colocated", decode=places, prefill={"max_num_batched_tokens": 64})
    records = Simulation(piped, costs()).run([Ask(0.0, 16, 80) for _ in range(9)])
    steps = costs().estimator()
    running = Site(0, steps, 64, 64, rows=StepShape(0, 0, 3, 150), num_places=3)
    gaps = sorted(gap for record in records for gap in record.gaps[30:60])
    assert running.itl(Work(16, 136, 16, 1)) == pytest.approx(gaps[len(gaps) // 2], rel=0.1)
    (record,) = Simulation(piped, costs()).run([Ask(0.0, 256, 1)])
    idle = Site(0, steps, 64, 64, num_places=3)
    assert idle.until_computed(Work(256, 256 * 257 // 2, 256, 1)) == pytest.approx(record.ttft, rel=0.05)
    one = Site(0, steps, 64, 64)
    assert one.until_computed(Work(256, 256 * 257 // 2, 256, 1)) < 0.7 * record.ttft


@pytest.mark.parametrize("output_len", [16, 128])
def test_under_overload_auto_serves_long_prompts_about_as_fast_as_a_colocated_fleet(output_len: int) -> None:
    """Chunks beside running sequences grow with the queue, which the replicas do not see themselves."""
    steps = predicted_steps(LLAMA_2_13B, GPUS["h100"], 1, 2048, 4096)
    h100 = Costs(steps=steps, kv_token_bytes=LLAMA_2_13B.kv_token_bytes, num_kv_tokens=56_000)
    asks = [Ask(0.04 * index, 1949, output_len) for index in range(120)]
    ends = []
    for each in (deployment(scheduler={"roles": "auto"}), deployment("colocated", decode={"devices": ["cpu"] * 2})):
        records = Simulation(each, h100).run(asks)
        assert all(record.is_complete for record in records)
        ends.append(max(record.times[-1] for record in records))
    assert ends[0] < 1.12 * ends[1]


@pytest.mark.parametrize(("rate", "targets"), [(14.0, {"tpot": 40.0}), (16.0, {"tpot": 40.0}), (10.0, {"itl": 28.0})])
def test_auto_serves_chat_as_well_as_a_colocated_fleet_where_kv_is_what_lacks(
    rate: float, targets: dict[str, float]
) -> None:
    """Both GPUs have to hold sequences: one alone has no room for them, nor are its steps short enough."""
    steps = predicted_steps(OPT_13B, GPUS["h100"], 1, 2048, 2048)
    h100 = Costs(steps=steps, kv_token_bytes=OPT_13B.kv_token_bytes, num_kv_tokens=57_000)
    asks = [Ask(due, 759, 235) for due in arrivals(round(16 * rate), rate, 1.0, random.Random(0))]
    targets = {"ttft": 250.0, **targets}
    told = {f"{metric}_target_ms": ms for metric, ms in targets.items()}
    colocated = {"devices": ["cpu"] * 2, "local_prefill_tokens": 512 if "tpot" in targets else 256}
    auto, static = (
        mean(record.meets(targets) for record in Simulation(each, h100).run(asks))
        for each in (deployment(scheduler={"roles": "auto", **told}), deployment("colocated", decode=colocated))
    )
    assert auto > 0.97 * static


def test_pools_filled_by_what_is_needed_at_one_time_let_more_start_in_time() -> None:
    """By what is reserved one request in eight waits for room longer than its target. Nor does anybody stand still."""
    steps = predicted_steps(OPT_13B, GPUS["h100"], 1, 2048, 2048)
    h100 = Costs(steps=steps, kv_token_bytes=OPT_13B.kv_token_bytes, num_kv_tokens=36_000)
    asks = [Ask(due, 759, 235) for due in arrivals(450, 13.0, 1.0, random.Random(0))]
    decode = {"devices": ["cpu"] * 2, "local_prefill_tokens": 512}
    reserved, optimistic = (
        mean(
            record.meets({"ttft": 250.0, "itl": 40.0})
            for record in Simulation(deployment("colocated", decode={**decode, "admission": admission}), h100).run(asks)
        )
        for admission in ("reserved", "optimistic")
    )
    assert optimistic > reserved + 0.05


@pytest.mark.parametrize("name", ["middling", "chat"])
def test_where_requests_wait_for_room_auto_answers_as_many_as_the_best_chunk_does(name: str) -> None:
    """As prompts come when answers end, short chunks serve chat best, and longer ones where prompts are long."""
    [load] = [each for each in LOADS if each.name.startswith(name) and not each.targets]
    auto, short, long = (
        Runs(load, mode, 150, range(1)).throughput() for mode in ("auto", "colocated:256", "colocated:512")
    )
    assert auto > 0.95 * max(short, long)
    assert (short > 1.05 * long) == (name == "chat"), "one of them alone is the best"


def test_no_prompt_waits_for_the_faster_replica_while_pools_stand_empty_behind_a_long_queue() -> None:
    """Long enough for that to begin: where one computed the other one's prompts too, neither pool filled again."""
    [load] = [each for each in LOADS if each.name.startswith("chat") and not each.targets]
    auto, short = (Runs(load, mode, 600, range(1, 2)).throughput() for mode in ("auto", "colocated:256"))
    assert auto > 0.95 * short


def test_a_load_that_prefill_cannot_bear_alone_rides_at_once_also_after_a_quiet_time() -> None:
    """The share of its time that prompts take is a mean of many seconds, and says of the first ones that it is idle."""
    steps = predicted_steps(LLAMA_2_13B, GPUS["h100"], 1, 2048, 4096)
    h100 = Costs(steps=steps, kv_token_bytes=LLAMA_2_13B.kv_token_bytes, num_kv_tokens=56_000)
    told = deployment(scheduler={"roles": "auto", "ttft_target_ms": 1000.0, "itl_target_ms": 20.0})
    quiet = [Ask(float(index), 1949, 16) for index in range(20)]
    crowd = [Ask(20.0 + due, 1949, 16) for due in arrivals(150, 16.0, 1.0, random.Random(0))]
    records = Simulation(told, h100).run(quiet + crowd)[len(quiet) :]
    assert mean(record.meets({"ttft": 1000.0, "itl": 20.0}) for record in records) > 0.9
