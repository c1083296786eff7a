"""Running sequences go from busy replicas to others: when, by the real router and loops in virtual time; and that it
costs no answer, whatever happens meanwhile.
"""

import random
from collections.abc import Callable
from functools import partial
from statistics import mean

import pytest

from ensemble.config import Deployment, Roles
from ensemble.scheduling.estimator import StepShape, TimedStep
from tests.router.fake_fleet import BLOCK_SIZE, FakeFleet, answer
from tools.load.records import Record
from tools.simulation.costs import Costs
from tools.simulation.simulator import Ask, Simulation

SHAPES = [StepShape.of([], [length] * size) for size in (1, 4, 16, 64) for length in (16, 400)]
SHAPES += [StepShape.of([(0, length)], []) for length in (16, 64, 256)]
MOVES = ("distserve:moves_total", (("cause", "balance"),))
COMES_BACK_S = 1.0
CHANCES = {"go on": 60, "move": 20, "cancel": 1, "kill": 1, "drain": 1, "undrain": 3, "lose": 2}


def simulation(roles: Roles, row_s: float = 2e-3, **decode: int | str) -> Simulation:
    """Two replicas that compute prompts and decode: 5 ms a step, 0.1 a prompt's token, and `row_s` a sequence."""
    raw = {
        "mode": "colocated",
        "model": {"path": "/nowhere"},
        "prefill": {"devices": []},
        "decode": {"devices": ["cpu", "cpu"], **decode},
        "scheduler": {"roles": roles},
    }
    steps = [TimedStep(each, 5e-3 + 1e-4 * each.num_prompt_tokens + row_s * each.num_rows) for each in SHAPES]
    return Simulation(Deployment.parse(raw), Costs(steps=steps, kv_token_bytes=1000, num_kv_tokens=64_000))


def comes_back(served: Simulation, num_seqs: int = 12, num_tokens: int = 400) -> list[Record]:
    """The second replica serves again when all sequences run at the first one."""
    second = served.router.fleet.get(1)
    assert second is not None
    served.router.changes.drain(second, None)
    served._at(COMES_BACK_S, partial(served.router.changes.undrain, second))
    return served.run([Ask(0.01 * index, 20, num_tokens) for index in range(num_seqs)])


def watch(served: Simulation, at: list[float], look: Callable[[], object]) -> list[object]:
    """What is seen at these times."""
    seen: list[object] = []
    for time in at:
        served._at(time, lambda: seen.append(look()))
    return seen


def test_two_unequal_replicas_become_even_and_stay_so() -> None:
    served = simulation("auto")
    seqs = watch(
        served,
        [0.9, 4.0, 5.0, 6.0],
        lambda: [served.router.dispatch.decoders.num_seqs(replica) for replica in (0, 1)],
    )
    moves = watch(served, [4.0, 6.0], lambda: served.router.gauges()[MOVES])
    records = comes_back(served)
    assert seqs[0] == [12, 0]
    assert seqs[1] == seqs[2] == seqs[3] and seqs[1] in ([7, 5], [6, 6])
    assert moves == [12 - seqs[1][0]] * 2  # each once
    assert all(record.num_tokens == 400 for record in records)

    before = comes_back(simulation("fixed"))
    assert mean(record.times[-1] for record in records) < 0.8 * mean(record.times[-1] for record in before)


@pytest.mark.parametrize(
    ("roles", "row_s", "num_tokens"),
    [("fixed", 2e-3, 400), ("auto", 1e-5, 400), ("auto", 2e-3, 45)],
    ids=["fixed roles", "no faster elsewhere", "all end soon"],
)
def test_nothing_moves_for_a_small_gain_or_with_fixed_roles(roles: Roles, row_s: float, num_tokens: int) -> None:
    served = simulation(roles, row_s)
    comes_back(served, num_tokens=num_tokens)
    assert MOVES not in served.router.gauges()


def test_sequences_that_wait_for_their_turn_go_where_there_is_room() -> None:
    """Two run at a time, and the others wait in the host pool."""
    records: dict[Roles, list[Record]] = {}
    modes: tuple[Roles, ...] = ("fixed", "auto")
    for roles in modes:
        served = simulation(roles, policy="mlfq", max_num_seqs=2, max_num_resident_seqs=12, host_kv_bytes=40_000_000)
        records[roles] = comes_back(served, num_tokens=200)
        assert (MOVES in served.router.gauges()) == (roles == "auto")
    last_s = {roles: max(record.times[-1] for record in each) for roles, each in records.items()}
    assert last_s["auto"] < 0.8 * last_s["fixed"]


@pytest.mark.parametrize("admission", ["optimistic", "reserved"])
@pytest.mark.parametrize(("num_prefill", "num_decode"), [(0, 3), (1, 2), (1, 1)])
def test_moves_at_any_time_cost_no_answer_and_no_block(num_prefill: int, num_decode: int, admission: str) -> None:
    """Beside cancels, deaths, drains and lost acknowledgements: each token comes once."""
    num_moved = 0
    for seed in range(15):
        rng = random.Random(seed)
        fleet = busy_fleet(num_prefill, num_decode, admission)
        asked = [fleet.arrive(rng.randint(1, 12), rng.randint(1, 24)) for _ in range(6)]
        cancelled = set()
        for _ in range(120):
            replica = fleet.router.fleet.get(rng.randrange(num_prefill + num_decode))
            assert replica is not None
            match rng.choices(list(CHANCES), list(CHANCES.values()))[0]:
                case "go on":
                    fleet.deliver(replica.id)
                    if replica.id in fleet.replicas and rng.random() < 0.5:
                        fleet.replicas[replica.id].step(fleet)
                case "move":
                    lives = [life for life in fleet.router.lives if life.phase == "decode"]
                    if lives:
                        fleet.router.balance.move(rng.choice(lives), replica)
                case "cancel":
                    request_id = rng.choice(asked)[0].request_id
                    cancelled.add(request_id)
                    fleet.router.cancel(request_id)
                case "kill" if replica.id in fleet.replicas:
                    fleet.kill(replica.id)
                case "drain":
                    fleet.router.changes.drain(replica, fleet.now)
                case "undrain":
                    fleet.router.changes.undrain(replica)
                case "lose":
                    fleet.loses_acknowledgements = not fleet.loses_acknowledgements
            fleet.check()
        fleet.loses_acknowledgements = False
        for replica in fleet.router.fleet:
            fleet.router.changes.undrain(replica)
        fleet.tick()
        fleet.run()
        for request, client in asked:
            assert client.tokens == answer(request) or request.request_id in cancelled
            assert client.tokens == answer(request)[: len(client.tokens)]
        fleet.assert_empty()
        num_moved += int(fleet.router.gauges().get(MOVES, 0))
    assert num_moved > 30


def busy_fleet(num_prefill: int, num_decode: int, admission: str) -> FakeFleet:
    raw = {
        "mode": "disaggregated" if num_prefill else "colocated",
        "model": {"path": "unused"},
        "prefill": {"devices": ["cpu"] * num_prefill, "max_num_batched_tokens": 16},
        "decode": {"devices": ["cpu"] * num_decode, "admission": admission},
        "scheduler": {"roles": "auto"},
        "block_size": BLOCK_SIZE,
    }
    fleet = FakeFleet(Deployment.parse(raw))
    fleet.run()
    return fleet
