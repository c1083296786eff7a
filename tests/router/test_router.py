"""The router against replicas that compute known answers: what clients get, whatever happens to the replicas."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ensemble.cache.prefix_cache import block_hashes
from ensemble.config import Deployment
from ensemble.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, StageUnavailable, TargetOutOfReach
from ensemble.protocol.router_replica import AttachFailed, LeasePrefix, PullPrefix
from ensemble.scheduling.policies import Hints
from tests.router.fake_fleet import BLOCK_SIZE, FakeFleet, answer

RESERVED = {"admission": "reserved"}


def deploy(num_prefill: int = 1, num_decode: int = 1, mode: str = "disaggregated", **sections: dict) -> Deployment:
    raw = {
        "mode": mode,
        "model": {"path": "unused"},
        "prefill": {"devices": ["cpu"] * num_prefill, "max_num_batched_tokens": 16},
        "decode": {"devices": ["cpu"] * num_decode},
        "block_size": BLOCK_SIZE,
    }
    for name, fields in sections.items():
        raw[name] = raw.get(name, {}) | fields
    return Deployment.parse(raw)


def make_fleet(*shape: int, **changes) -> FakeFleet:
    fleet = FakeFleet(deploy(*shape, **changes))
    fleet.run()
    return fleet


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((1, 1), "disaggregated"), ((2, 2), "disaggregated"), ((1, 3), "disaggregated"), ((0, 2), "colocated")],
)
def test_every_shape_of_fleet_answers_and_uses_all_its_replicas(shape, mode):
    fleet = make_fleet(*shape, mode=mode)
    asked = [fleet.arrive(prompt_len, max_tokens=6) for prompt_len in [5, 9, 14, 20, 3, 7, 11, 2]]
    fleet.run()
    for request, client in asked:
        assert client.tokens == answer(request) and client.finish_reason == "length"
    used = {client.timeline.prefill_replica for _, client in asked} | {
        client.timeline.decode_replica for _, client in asked
    }
    assert {replica.id for replica in fleet.router.fleet} <= used
    fleet.assert_empty()


def test_mixed_beside_decode(**_):
    fleet = make_fleet(1, 2)
    fleet.router.changes.set_role(fleet.router.fleet.get(1), "mixed")
    asked = [fleet.arrive(6, max_tokens=5) for _ in range(8)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    assert -1 in {client.timeline.prefill_replica for _, client in asked}  # computed where it decodes
    fleet.assert_empty()


def steps(fleet, count):
    for _ in range(count):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)


def test_beside_a_mixed_replica_one_that_only_decodes_is_used_too():
    fleet = make_fleet(0, 2, mode="colocated")
    fleet.router.changes.set_role(fleet.router.fleet.get(1), "decode")
    asked = [fleet.arrive(6, max_tokens=5) for _ in range(8)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    assert {client.timeline.decode_replica for _, client in asked} == {0, 1}
    assert {client.timeline.prefill_replica for _, client in asked} == {-1, 0}  # stayed there, or were handed off
    fleet.assert_empty()


def test_in_auto_both_sides_compute_and_decode_when_there_is_more_than_prefill_can_do():
    fleet = make_fleet(1, 1, scheduler={"roles": "auto"})
    asked = [fleet.arrive(16, max_tokens=3) for _ in range(10)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    computed_where_it_decodes = [client for _, client in asked if client.timeline.prefill_replica == -1]
    assert {client.timeline.decode_replica for client in computed_where_it_decodes} == {0, 1}
    fleet.assert_empty()


def test_a_prompt_rides_for_free_where_nobody_runs_and_never_with_fixed_roles():
    for roles, computed_by in (("auto", {-1, 0}), ("fixed", {0})):
        fleet = make_fleet(1, 1, scheduler={"roles": roles})
        asked = [fleet.arrive(12, max_tokens=2) for _ in range(6)]
        fleet.run()
        assert {client.timeline.prefill_replica for _, client in asked} == computed_by


def test_in_auto_a_prefill_replica_decodes_what_the_others_have_no_room_for():
    """20 of 48 tokens of each pool at full length: two fit in decode, and what would wait for long stays."""
    fleet = make_fleet(1, 1, scheduler={"roles": "auto"}, prefill={"max_bridge_wait_s": 0.001}, decode=RESERVED)
    asked = [fleet.arrive(9, max_tokens=12) for _ in range(6)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    assert {client.timeline.decode_replica for _, client in asked} == {0, 1}
    assert all(client.timeline.num_recoveries == 0 for _, client in asked)
    fleet.assert_empty()


def test_where_a_prefill_replica_decodes_too_nothing_waits_there_with_its_kv_for_room_elsewhere():
    fleet = make_fleet(1, 1, scheduler={"roles": "auto"}, prefill={"max_bridge_wait_s": 100.0}, decode=RESERVED)
    asked = [fleet.arrive(9, max_tokens=12) for _ in range(8)]
    decoders, admission = fleet.router.dispatch.decoders, fleet.router.dispatch.admission
    num_decoding = []
    for _ in range(100):
        steps(fleet, 1)
        fleet.tick()
        num_decoding.append(decoders.num_seqs(0))
        assert not (decoders.num_seqs(0) and decoders.num_seqs(1) == 2 and admission.num_bridge_seqs)
    assert max(num_decoding) == 2
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    fleet.assert_empty()


@pytest.mark.parametrize(("max_wait_s", "num_started"), [(0.0, 2), (100.0, 4)])
def test_prefill_starts_what_will_not_wait_too_long_for_decode(max_wait_s, num_started):
    """5 of decode's 12 blocks each: the third has to wait for the end of the first."""
    fleet = make_fleet(1, 1, prefill={"max_bridge_wait_s": max_wait_s}, decode=RESERVED)
    asked = [fleet.arrive(9, max_tokens=12) for _ in range(4)]
    steps(fleet, 12)
    assert sum(client.timeline.first_scheduled_ns > 0 for _, client in asked) == num_started
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)


def test_a_first_token_is_predicted_when_its_prompt_is_started():
    fleet = make_fleet(1, 1)
    _, client = fleet.arrive(12, max_tokens=3)
    fleet.run()
    predicted_s = (client.timeline.predicted_first_token_ns - client.timeline.first_scheduled_ns) / 1e9
    assert predicted_s == pytest.approx(1e-3 + 12 * 5e-5, rel=0.2)  # what the replica says of its steps


@pytest.mark.parametrize("on_missed_target", ["serve", "refuse"])
def test_what_will_miss_its_target_is_refused_before_anything_is_computed_or_served_late(on_missed_target):
    fleet = make_fleet(1, 1, scheduler={"on_missed_target": on_missed_target, "ttft_target_ms": 8.0})
    asked = [fleet.arrive(16, max_tokens=2) for _ in range(20)]  # 1.8 ms each
    own = fleet.arrive(16, max_tokens=2, hints=Hints(ttft_target_s=1000.0))
    refused = [client for _, client in asked if client.error is not None]
    assert bool(refused) == (on_missed_target == "refuse")
    fleet.now += 1.0  # what waits has missed it by now
    fleet.run()
    for request, client in [*asked, own]:
        if client.error is None:
            assert client.tokens == answer(request)
        else:
            assert isinstance(client.error, TargetOutOfReach) and client.error.retry_after_s > 0
            assert not client.tokens and not client.timeline.first_scheduled_ns
    assert own[1].error is None
    fleet.assert_empty()


def test_nobody_is_refused_for_being_late_apart_who_would_be_in_time_beside_others():
    scheduler = {"roles": "auto", "on_missed_target": "refuse", "ttft_target_ms": 12.0, "itl_target_ms": 1000.0}
    fleet = make_fleet(1, 3, scheduler=scheduler)
    asked = []
    for _ in range(20):  # 1.8 ms each, if one replica computed them all
        asked.append(fleet.arrive(16, max_tokens=2))
        fleet.now += 0.5e-3
    fleet.run()
    assert all(client.error is None and client.tokens == answer(request) for request, client in asked)
    fleet.assert_empty()


@pytest.mark.parametrize("lost", [0, 1])
def test_in_auto_whoever_is_left_does_it_all(lost):
    fleet = make_fleet(1, 1, scheduler={"roles": "auto"})
    fleet.kill(lost)
    fleet.waiting.clear()  # it does not come back
    fleet.tick()
    asked = [fleet.arrive(6, max_tokens=6) for _ in range(3)]
    fleet.run()
    fleet.now += 100
    fleet.run()
    assert fleet.router.is_serving
    assert all(client.tokens == answer(request) for request, client in asked)


def test_roles_follow_the_load_and_answers_stay_the_same():
    fleet = make_fleet(1, 3, scheduler={"roles": "auto", "ttft_target_ms": 2.0, "max_prefill_replicas": 2})
    asked = []
    for _ in range(12):  # prompts that wait, and nothing to decode
        asked += [fleet.arrive(16, max_tokens=1) for _ in range(12)]
        fleet.now += 0.6
        fleet.tick()
    assert [replica.role for replica in fleet.router.fleet].count("prefill") == 2
    fleet.now += 60.0
    fleet.tick()
    assert [replica.role for replica in fleet.router.fleet].count("prefill") == 2  # its bound
    assert fleet.router.gauges()["distserve:role_changes_total", (("to", "prefill"),)] == 1
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    fleet.assert_empty()


@pytest.mark.parametrize("replica_id", [0, 1])
@pytest.mark.parametrize("num_steps", range(14))
def test_a_lost_replica_costs_time_and_not_answers(replica_id, num_steps):
    fleet = make_fleet(1, 1)
    asked = [fleet.arrive(prompt_len, max_tokens=7) for prompt_len in (3, 18, 6)]
    for _ in range(num_steps):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    fleet.kill(replica_id)
    fleet.run()
    for request, client in asked:
        assert client.error is None and client.tokens == answer(request)
    fleet.assert_empty()


def test_what_died_twice_is_tried_alone_and_given_up_after_its_own_deaths():
    fleet = make_fleet(1, 1)
    poison, client = fleet.arrive(4, max_tokens=40)
    healthy = []
    num_alone_deaths = 0
    for _ in range(20):
        if client.is_over:
            break
        healthy.append(fleet.arrive(3, max_tokens=4))
        for _ in range(40):  # until it decodes: there it kills
            for replica in list(fleet.replicas.values()):
                fleet.deliver(replica.id)
                replica.step(fleet)
            decoding = (
                [r.request.prompt_token_ids[0] for r in fleet.replicas[1].running.values()]
                if 1 in fleet.replicas
                else []
            )
            if poison.prompt_token_ids[0] in decoding:
                num_alone_deaths += len(decoding) == 1
                fleet.kill(1)
                break
        for _ in range(10):
            for replica_id in (0, 1):
                fleet.deliver(replica_id)
    fleet.run()
    assert isinstance(client.error, StageUnavailable) and "alone" in str(client.error)
    assert num_alone_deaths >= 4  # max_recoveries = 3 of its own, and one more
    assert all(each.tokens == answer(request) for request, each in healthy)
    fleet.assert_empty()


def test_a_draining_replica_lets_what_runs_finish_and_gets_nothing_new():
    fleet = make_fleet(1, 2)
    asked = [fleet.arrive(4, max_tokens=8) for _ in range(4)]
    for _ in range(6):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    fleet.router.changes.drain(fleet.router.fleet.get(1), None, is_leaving=True)
    later = [fleet.arrive(4, max_tokens=8) for _ in range(4)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked + later)
    assert all(client.timeline.num_recoveries == 0 for _, client in asked)
    assert all(client.timeline.decode_replica == 2 for _, client in later)
    assert fleet.router.fleet.get(1) is None and 1 not in fleet.replicas  # it has left
    fleet.assert_empty()


def test_a_drain_that_takes_too_long_moves_what_runs():
    fleet = make_fleet(1, 2)
    asked = [fleet.arrive(4, max_tokens=20) for _ in range(2)]
    for _ in range(6):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    fleet.router.changes.drain(fleet.router.fleet.get(1), fleet.now + 1.0)
    fleet.now += 1.5
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    assert not any(client.timeline.num_recoveries for _, client in asked)  # with its KV
    assert all(client.timeline.decode_replica == 2 for _, client in asked)
    fleet.assert_empty()


@pytest.mark.parametrize("ends", ["drain", "kill"])
@pytest.mark.parametrize("role", ["decode", "mixed"])
def test_what_was_decoded_before_a_move_is_decode_in_the_timeline(role, ends):
    """And neither the bridge nor the transfer before it."""
    fleet = make_fleet(1, 1)
    fleet.router.changes.set_role(fleet.router.fleet.get(1), role)
    if role == "mixed":
        fleet.router.changes.drain(fleet.router.fleet.get(0), None)
    request, client = fleet.arrive(4, max_tokens=20)
    while len(client.tokens) < 6:
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    timeline = client.timeline
    before = timeline.decode_submitted_ns, timeline.decode_joined_ns, timeline.kv_transfer_bytes
    assert all(before) if role == "decode" else not any(before)
    fleet.router.changes.add("decode", "cpu", "decode")
    fleet.start(2)
    fleet.router.changes.undrain(fleet.router.fleet.get(0))
    if ends == "kill":
        fleet.kill(1)
    else:
        fleet.router.changes.drain(fleet.router.fleet.get(1), fleet.now)
    fleet.run()
    assert client.tokens == answer(request)
    assert timeline.decode_replica == 2 or ends == "kill"
    assert timeline.num_recoveries == (ends == "kill")
    assert (timeline.decode_submitted_ns, timeline.decode_joined_ns, timeline.kv_transfer_bytes) == before
    fleet.assert_empty()


@pytest.mark.parametrize("ends", ["kill source", "kill reader", "cancel", "undrain", "unmappable"])
@pytest.mark.parametrize("num_rounds", range(4))
def test_whatever_happens_while_sequences_go_over_costs_no_answer(ends, num_rounds):
    fleet = make_fleet(1, 2)
    asked = [fleet.arrive(4, max_tokens=20) for _ in range(4)]
    for _ in range(6):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    source = fleet.router.fleet.get(1)
    fleet.router.changes.drain(source, fleet.now)
    fleet.tick()
    for number in range(num_rounds):
        fleet.deliver(1 + number % 2)
    match ends:
        case "kill source":
            fleet.kill(1)
        case "kill reader":
            fleet.kill(2)
        case "cancel":
            fleet.router.cancel(asked[0][0].request_id)
        case "undrain":
            fleet.router.changes.undrain(source)
        case "unmappable":
            arrived = list(fleet.replicas[2].arrivals)
            for request_id in arrived:
                fleet.replicas[2]._cancel(request_id, fleet)
            failed = AttachFailed(address=fleet.replicas[1].address, reason="no such pool", request_ids=arrived)
            fleet.replicas[2].out.append(failed)
    fleet.run()
    for number, (request, client) in enumerate(asked):
        is_cancelled = ends == "cancel" and number == 0
        assert client.error is None or is_cancelled
        assert client.tokens == answer(request) or is_cancelled
    fleet.assert_empty()


@pytest.mark.parametrize("is_lost", [False, True], ids=["late", "lost"])
def test_a_sequence_can_go_back_to_where_the_end_of_its_lease_was_not_told(is_lost):
    fleet = make_fleet(1, 2)
    request, client = fleet.arrive(4, max_tokens=30)
    life = fleet.router.lives.get(request.request_id)
    for _ in range(50):
        fleet.router.dispatch.output_estimate.observe(request, 1)

    def go(source_id, reader_id):
        """Of the source the router hears no more than it has to."""
        fleet.router.changes.drain(fleet.router.fleet.get(source_id), fleet.now)
        fleet.tick()
        while life.decode_replica != reader_id or life.prefill_replica is not None:
            if life.phase == "decode" and life.decode_replica == source_id:
                fleet.deliver(source_id)
            fleet.deliver(reader_id)
            fleet.replicas[reader_id].step(fleet)

    while life.phase != "decode" or life.prefill_replica is not None:
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    first = life.decode_replica
    second = 3 - first
    fleet.loses_acknowledgements = is_lost
    go(first, second)
    fleet.loses_acknowledgements = False
    assert request.request_id in fleet.router.fleet.get(first).credits
    for _ in range(6):
        fleet.deliver(second)
        fleet.replicas[second].step(fleet)
    fleet.router.changes.undrain(fleet.router.fleet.get(first))
    fleet.router.changes.drain(fleet.router.fleet.get(second), fleet.now)
    fleet.tick()
    while life.phase == "decode" and life.decode_replica == second:
        fleet.deliver(second)
    assert len(life.output_token_ids) > 6
    num_blocks = -(-(4 + len(life.output_token_ids)) // BLOCK_SIZE)
    assert fleet.router.dispatch.admission.num_promised_blocks >= num_blocks  # though shorter ones were expected
    fleet.run()
    assert client.tokens == answer(request) and not client.timeline.num_recoveries
    assert client.timeline.decode_replica == first
    assert fleet.router.fleet.get(first).kv_token_bytes == 1.0  # its output counts too
    fleet.assert_empty()


def test_roles_change_under_load():
    fleet = make_fleet(1, 2)
    asked = []
    for role in ("prefill", "mixed", "decode", "mixed"):
        asked += [fleet.arrive(6, max_tokens=6) for _ in range(3)]
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
        fleet.router.changes.set_role(fleet.router.fleet.get(2), role)
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    fleet.assert_empty()


def test_a_prefill_replica_that_becomes_the_only_decoder_goes_on_with_what_it_leased():
    fleet = make_fleet(2, 1)
    fleet.kill(2)
    asked = [fleet.arrive(6, max_tokens=6) for _ in range(2)]
    for _ in range(8):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    for replica_id in (0, 1):
        fleet.router.changes.set_role(fleet.router.fleet.get(replica_id), "mixed")
    fleet.waiting.clear()  # the decode replica does not come back
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)


def test_an_added_replica_is_used():
    fleet = make_fleet(1, 1)
    added = fleet.router.changes.add("decode", "cpu", "decode")
    fleet.start(added.id)
    fleet.run()
    asked = [fleet.arrive(4, max_tokens=8) for _ in range(6)]
    fleet.run()
    assert added.id in {client.timeline.decode_replica for _, client in asked}
    assert all(client.tokens == answer(request) for request, client in asked)


def test_a_replica_that_is_up_twice_or_lives_anew_leaves_a_consistent_fleet():
    fleet = make_fleet(1, 1)
    request, client = fleet.arrive(4, max_tokens=8)
    for _ in range(6):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    fleet.router.receive(fleet.replicas[1].up(), fleet.now)  # said again
    fleet.check()
    fleet.replicas.pop(1)
    fleet.start(1)  # its next life is told, and the end of the last is not
    fleet.run()
    assert client.tokens == answer(request)
    fleet.assert_empty()


def test_requests_wait_for_a_fleet_that_comes_back_and_are_refused_when_it_does_not():
    fleet = make_fleet(1, 1)
    fleet.kill(0)
    fleet.waiting.clear()
    fleet.deliver(1)
    request, client = fleet.arrive(4, max_tokens=4)
    fleet.now += 10
    fleet.tick()
    assert not client.is_over and not fleet.router.is_serving
    fleet.now += 25
    fleet.tick()
    assert isinstance(client.error, StageUnavailable) and "killed" in str(client.error)
    _, late = fleet.arrive(4, max_tokens=4)
    assert isinstance(late.error, StageUnavailable)
    fleet.start(0)
    fleet.run()
    assert fleet.router.is_serving
    request, client = fleet.arrive(4, max_tokens=4)
    fleet.run()
    assert client.tokens == answer(request)


def test_choices_wait_until_the_first_has_computed_their_prompt():
    """Also where its replica dies meanwhile. Without a prefix cache, or a block to share, they wait for nobody."""
    for num_tokens, prefix_cache in ((9, True), (BLOCK_SIZE - 1, True), (9, False)):
        fleet = make_fleet(2, 1, prefill={"prefix_cache": prefix_cache})
        first = fleet.arrive(num_tokens, max_tokens=3)
        others = [fleet.arrive(num_tokens, max_tokens=3, same_prompt=first[0]) for _ in range(3)]
        waits = [client.timeline.first_scheduled_ns == 0 for _, client in others]
        assert all(waits) == (num_tokens > BLOCK_SIZE and prefix_cache)
        for _ in range(2):
            fleet.kill(first[1].timeline.prefill_replica)
            steps(fleet, 3)
        fleet.run()
        for request, client in [first, *others]:
            assert client.tokens == answer(request) and client.finish_reason == "length"
            if all(waits):
                assert request is first[0] or client.timeline.first_scheduled_ns >= first[1].timeline.first_token_ns
        fleet.assert_empty()


def test_choices_that_wait_for_the_first_are_cancelled_time_out_and_outlive_it():
    fleet = make_fleet(1, 1)
    first = fleet.arrive(9, max_tokens=3)
    cancelled = fleet.arrive(9, max_tokens=3, same_prompt=first[0])
    late = fleet.arrive(9, max_tokens=3, same_prompt=first[0], deadline=fleet.now + 5)
    left = fleet.arrive(9, max_tokens=3, same_prompt=first[0])
    assert fleet.router.gauges()["vllm:num_requests_waiting", ()] == 3
    fleet.router.cancel(cancelled[0].request_id)
    fleet.now += 10
    fleet.tick()
    fleet.router.cancel(first[0].request_id)
    fleet.run()
    assert isinstance(cancelled[1].error, Cancelled) and isinstance(late[1].error, DeadlineExceeded)
    assert isinstance(first[1].error, Cancelled) and left[1].tokens == answer(left[0])
    after = fleet.arrive(9, max_tokens=3, same_prompt=first[0])  # which is gone
    fleet.run()
    assert after[1].tokens == answer(after[0])
    fleet.assert_empty()


def test_cancels_and_deadlines_end_a_request_in_every_state():
    for num_steps in range(12):
        fleet = make_fleet(1, 1)
        cancelled, late = fleet.arrive(9, max_tokens=9), fleet.arrive(9, max_tokens=9, deadline=fleet.now + 5)
        for _ in range(num_steps):
            for replica in list(fleet.replicas.values()):
                fleet.deliver(replica.id)
                replica.step(fleet)
        is_over = cancelled[1].is_over, late[1].is_over
        fleet.router.cancel(cancelled[0].request_id)
        fleet.now += 6
        fleet.tick()
        assert is_over[0] or isinstance(cancelled[1].error, Cancelled)
        assert is_over[1] or isinstance(late[1].error, DeadlineExceeded)
        fleet.run()
        fleet.assert_empty()


def test_a_pool_that_nobody_can_map_is_an_error_and_no_wait():
    from ensemble.protocol.router_replica import AttachFailed

    fleet = make_fleet(1, 1)
    source = fleet.replicas[0]
    fleet.replicas[1].out.append(AttachFailed(address=source.address, reason="no peer access", request_ids=[]))
    fleet.run()
    _, client = fleet.arrive(4, max_tokens=4)
    fleet.run()
    assert isinstance(client.error, StageUnavailable) and "no peer access" in str(client.error)
    fleet.assert_empty()


def test_in_auto_what_nobody_can_map_is_decoded_where_it_was_computed():
    from ensemble.protocol.router_replica import AttachFailed

    fleet = make_fleet(1, 1, scheduler={"roles": "auto"})
    early = [fleet.arrive(16, max_tokens=4) for _ in range(4)]
    fleet.replicas[1].out.append(AttachFailed(address=fleet.replicas[0].address, reason="no", request_ids=[]))
    late = [fleet.arrive(16, max_tokens=4) for _ in range(8)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in early + late)
    assert {client.timeline.decode_replica for _, client in late} == {0, 1}
    fleet.assert_empty()


def test_a_lost_acknowledgement_keeps_no_block_for_longer_than_the_request():
    fleet = make_fleet(2, 2)
    fleet.loses_acknowledgements = True
    asked = [fleet.arrive(4, max_tokens=4) for _ in range(8)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    fleet.assert_empty()


def second_turn(fleet):
    """A prompt whose beginning is cached where the first one was decoded alone."""
    known = fleet.replicas[1]
    first, _ = fleet.arrive(24, 2, beginning=1)
    fleet.run()
    known._cache(block_hashes(first.prompt_token_ids, 4))
    fleet.replicas[0].cached.clear()
    fleet.run()
    fleet.router.dispatch.prefixes.update(0, [], block_hashes(first.prompt_token_ids, 4))
    return fleet.arrive(28, 4, beginning=1)


def test_a_prefix_that_another_replica_has_is_fetched_before_the_rest_is_computed():
    fleet = make_fleet(1, 1)
    request, client = second_turn(fleet)
    assert [type(each) for each in fleet.replicas[1].inbox] == [LeasePrefix] and not fleet.replicas[0].inbox
    fleet.run()
    assert client.tokens == answer(request)
    assert fleet.replicas[0].num_fetched_tokens == 24
    known = fleet.router.fleet.get(0)
    assert known is not None and known.prefix_pulls.has_samples
    assert fetches(fleet) == {"fetched": 1}
    fleet.assert_empty()


def fetches(fleet):
    """Of prefixes, by what came of them, as the metrics tell."""
    levels = fleet.router.gauges().items()
    return {
        dict(labels)["result"]: count for (name, labels), count in levels if name == "distserve:prefix_fetches_total"
    }


@pytest.mark.parametrize(
    ("ends", "result"), [("broken link", "failed"), ("kill reader", "failed"), ("evict", "evicted")]
)
def test_a_prefix_that_does_not_come_is_counted_and_computed(ends, result):
    fleet = make_fleet(1, 1)
    request, client = second_turn(fleet)
    if ends == "evict":
        fleet.replicas[1].cached.clear()
    fleet.deliver(1)
    while fleet.replicas[1].out:
        fleet.deliver(1)
    fleet.deliver(0)
    match ends:
        case "broken link":
            (lease_id,) = fleet.replicas[0].fetching
            fleet.replicas[0]._end_fetching(lease_id, fleet, "the link is broken")
        case "kill reader":
            fleet.kill(0)
    fleet.run()
    assert client.tokens == answer(request)
    assert fetches(fleet)[result] == 1
    fleet.assert_empty()


@pytest.mark.parametrize("ends", ["kill source", "kill reader", "cancel", "evict", "unmappable", "lose"])
@pytest.mark.parametrize("num_rounds", range(5))
def test_whatever_happens_while_a_prefix_is_fetched_nothing_stays_leased(ends, num_rounds):
    fleet = make_fleet(1, 1)
    request, client = second_turn(fleet)
    fleet.loses_acknowledgements = ends == "lose"
    for number in range(num_rounds):
        fleet.deliver(1 - number % 2)
    match ends:
        case "kill source":
            fleet.kill(1)
        case "kill reader":
            fleet.kill(0)
        case "cancel":
            fleet.router.cancel(request.request_id)
        case "evict":
            fleet.replicas[1].cached.clear()
        case "unmappable":
            for pull in [each for each in fleet.replicas[0].inbox if isinstance(each, PullPrefix)]:
                fleet.replicas[0].inbox.remove(pull)
                failed = AttachFailed(address=fleet.replicas[1].address, reason="no such pool", request_ids=[])
                fleet.replicas[0].out.append(failed)
    fleet.run()
    assert client.tokens == ([] if ends == "cancel" else answer(request))
    fleet.assert_empty()


def test_a_prompt_whose_prefix_has_come_and_that_waits_for_its_turn_can_be_cancelled():
    """Its replica, which is busy, has been sent nothing of it."""
    fleet = make_fleet(1, 1)
    request, client = second_turn(fleet)
    others = [fleet.arrive(20, 2) for _ in range(2)]  # as many batches as may be in flight
    fleet.deliver(1)
    reader = fleet.replicas[0]
    while reader.inbox or reader.out:
        fleet.deliver(0)
    (lease_id,) = reader.fetching
    reader._end_fetching(lease_id, fleet)
    while reader.out:
        fleet.deliver(0)
    assert reader.num_fetched_tokens == 24 and request.request_id not in reader.prompts
    fleet.router.cancel(request.request_id)
    fleet.run()
    assert isinstance(client.error, Cancelled)
    assert all(each.tokens == answer(asked) for asked, each in others)
    fleet.assert_empty()


@pytest.mark.parametrize("num_failing", [1, 3])
def test_kv_that_does_not_come_is_computed_again(num_failing):
    fleet = make_fleet(1, 1)
    fleet.replicas[1].num_failing_pulls = num_failing
    asked = [fleet.arrive(4, max_tokens=4) for _ in range(2)]
    fleet.run()
    assert all(client.tokens == answer(request) for request, client in asked)
    assert sum(client.timeline.num_recoveries for _, client in asked) == num_failing
    fleet.assert_empty()


def test_kv_that_never_comes_is_an_error_that_says_why():
    fleet = make_fleet(1, 1)
    fleet.replicas[1].num_failing_pulls = 1000
    _, client = fleet.arrive(4, max_tokens=8)
    fleet.run()
    assert isinstance(client.error, StageUnavailable) and "the link is broken" in str(client.error)
    fleet.assert_empty()


@pytest.mark.parametrize("first_token", ["held", "at_once"])
def test_the_first_token_waits_for_a_place_in_decode_or_not(first_token):
    fleet = make_fleet(1, 1, scheduler={"first_token": first_token})
    _, first = fleet.arrive(3, max_tokens=40)  # leaves room for nothing else
    for _ in range(8):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    assert len(first.tokens) > 1
    request, client = fleet.arrive(5, max_tokens=4)
    only_token, its_client = fleet.arrive(5, max_tokens=1)
    for _ in range(6):
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    assert its_client.tokens == answer(only_token)  # nothing to wait for
    assert client.tokens == ([] if first_token == "held" else answer(request)[:1])
    while not client.timeline.decode_joined_ns:
        for replica in list(fleet.replicas.values()):
            fleet.deliver(replica.id)
            replica.step(fleet)
    assert client.timeline.decode_joined_ns and client.tokens == answer(request)[:1]  # before any token of decode's own
    fleet.run()
    assert client.tokens == answer(request)
    fleet.assert_empty()


@pytest.mark.parametrize("victims", [[0], [1], [0, 1], [1, 1]])
def test_a_held_token_outlives_the_replicas_and_comes_once(victims):
    fleet = make_fleet(1, 1)
    for request, client in [fleet.arrive(5, max_tokens=6) for _ in range(6)]:
        for replica_id in victims:
            life = fleet.router.lives.get(request.request_id)
            while life is not None and life.phase != "answering" and not life.held and not client.tokens:
                for replica in list(fleet.replicas.values()):
                    fleet.deliver(replica.id)
                    replica.step(fleet)
            if replica_id in fleet.replicas:
                fleet.kill(replica_id)
            assert client.tokens == answer(request)[: len(client.tokens)]
        fleet.run()
        assert client.tokens == answer(request)
    fleet.assert_empty()


@pytest.mark.parametrize(("mode", "shape"), [("disaggregated", (1, 1)), ("colocated", (0, 1))])
def test_outputs_longer_than_expected_are_computed_again_and_counted_apart(mode, shape):
    """9 of 12 blocks at full length, 2 expected: five at once outgrow the pool, time and again."""
    fleet = make_fleet(*shape, mode=mode, decode={"admission": "optimistic"})
    for _ in range(60):  # outputs were short lately
        fleet.router.dispatch.output_estimate.observe(fleet.arrive(1, max_tokens=20)[0], 1)
        fleet.run()
    asked = [fleet.arrive(5, max_tokens=32) for _ in range(5)]
    fleet.run()
    assert all(client.tokens == answer(request) and client.error is None for request, client in asked)
    num_given_up = sum(replica.num_given_up for replica in fleet.replicas.values())
    gauges = fleet.router.gauges()
    assert num_given_up == sum(client.timeline.num_preemptions for _, client in asked) > 0
    assert gauges["distserve:preemptions_total", (("by", "recompute"),)] == num_given_up
    assert gauges["vllm:num_preemptions_total", ()] == num_given_up
    assert sum(client.timeline.num_recoveries for _, client in asked) == 0
    assert not any(name == "distserve:recoveries_total" for name, _ in gauges)
    fleet.assert_empty()


class AnyFleet(RuleBasedStateMachine):
    """Whatever happens, in whichever order: every request ends once, with the known answer or for a reason."""

    shape, mode, first_token, admission, roles = (2, 2), "disaggregated", "held", "optimistic", "fixed"

    def __init__(self):
        super().__init__()
        scheduler = {"first_token": self.first_token, "roles": self.roles}
        sections = {"scheduler": scheduler, "decode": {"admission": self.admission}}
        self.fleet = FakeFleet(deploy(*self.shape, mode=self.mode, **sections))
        self.fleet.run()
        self.asked = []
        self.cancelled = set()
        self.moved = set()  # told to, or has a token: a drain moves those, and they hold nothing back
        self.num_added = 0

    def known(self):
        return sorted(replica.id for replica in self.fleet.router.fleet)

    @rule(prompt_len=st.integers(1, 40), max_tokens=st.integers(1, 12), beginning=st.sampled_from([0, 1, 1, 2]))
    def arrive(self, prompt_len, max_tokens, beginning):
        self.asked.append(self.fleet.arrive(prompt_len, max_tokens, beginning=beginning))

    @precondition(lambda self: self.fleet.replicas)
    @rule(data=st.data(), beginning=st.integers(1, 2), is_kept=st.booleans())
    def decode_elsewhere(self, data, beginning, is_kept):
        """A replica has a beginning by an answer; or has evicted all, which the router has not heard."""
        replica = self.fleet.replicas[data.draw(st.sampled_from(sorted(self.fleet.replicas)))]
        if is_kept:
            replica._cache(block_hashes([beginning + 1000] + [1] * 31, BLOCK_SIZE))
        else:
            replica.cached.clear()

    @rule(data=st.data())
    def deliver(self, data):
        self.fleet.deliver(data.draw(st.sampled_from(self.known())))

    @rule(data=st.data(), count=st.integers(1, 4))
    def step(self, data, count):
        replica = self.fleet.replicas.get(data.draw(st.sampled_from(self.known())))
        for _ in range(count if replica is not None else 0):
            replica.step(self.fleet)

    @rule(count=st.integers(1, 6))
    def go_on(self, count):
        steps(self.fleet, count)

    def running(self):
        return [(replica, each) for replica in self.fleet.replicas.values() for each in replica.running]

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def preempt(self, data):
        replica, request_id = data.draw(st.sampled_from(self.running()))
        replica.give_up(request_id)

    def decoding(self):
        return [life for life in self.fleet.router.lives if life.phase == "decode"]

    @precondition(lambda self: self.decoding())
    @rule(data=st.data(), count=st.integers(0, 3))
    def move(self, data, count):
        """To any replica, whether it serves or not, and from where it may not have arrived yet."""
        life = data.draw(st.sampled_from(self.decoding()))
        self.moved.add(life.request_id)
        source_id, reader_id = life.decode_replica, data.draw(st.sampled_from(self.known()))
        self.fleet.router.balance.move(life, self.fleet.router.fleet.get(reader_id))
        for _ in range(count):
            self.fleet.deliver(source_id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        request, _ = data.draw(st.sampled_from(self.asked))
        self.cancelled.add(request.request_id)
        self.fleet.router.cancel(request.request_id)
        self.fleet.tick()

    @precondition(lambda self: len(self.asked) % 4 == 3 and self.fleet.replicas)
    @rule(data=st.data())
    def kill(self, data):
        self.fleet.kill(data.draw(st.sampled_from(sorted(self.fleet.replicas))))

    @precondition(lambda self: self.fleet.waiting)
    @rule(data=st.data())
    def start(self, data):
        self.fleet.start(data.draw(st.sampled_from(sorted(self.fleet.waiting))))

    @rule(data=st.data(), role=st.sampled_from(["prefill", "decode", "mixed"]))
    def change_role(self, data, role):
        self.fleet.router.changes.set_role(self.fleet.router.fleet.get(data.draw(st.sampled_from(self.known()))), role)
        self.fleet.tick()

    @rule(data=st.data(), within=st.none() | st.floats(0, 2))
    def drain(self, data, within):
        until = None if within is None else self.fleet.now + within
        self.fleet.router.changes.drain(self.fleet.router.fleet.get(data.draw(st.sampled_from(self.known()))), until)
        self.fleet.tick()

    @rule(data=st.data())
    def undrain(self, data):
        self.fleet.router.changes.undrain(self.fleet.router.fleet.get(data.draw(st.sampled_from(self.known()))))
        self.fleet.tick()

    @precondition(lambda self: self.num_added < 2)
    @rule(home=st.sampled_from(["prefill", "decode"]), role=st.sampled_from(["prefill", "decode", "mixed"]))
    def add(self, home, role):
        self.num_added += 1
        self.fleet.router.changes.add(home, "cpu", role)

    def staying(self):
        return sorted(replica.id for replica in self.fleet.router.fleet if not replica.is_leaving)

    @precondition(lambda self: len(self.staying()) > 2)
    @rule(data=st.data())
    def remove(self, data):
        replica = self.fleet.router.fleet.get(data.draw(st.sampled_from(self.staying())))
        self.fleet.router.changes.drain(replica, self.fleet.now, is_leaving=True)
        self.fleet.tick()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds):
        self.fleet.now += seconds
        self.fleet.tick()

    @invariant()
    def books_agree(self):
        self.fleet.check()

    @invariant()
    def a_first_token_is_held_until_its_sequence_has_joined_decode(self):
        for request, client in self.asked:
            life = self.fleet.router.lives.get(request.request_id)
            if life is None or client.is_over:
                continue
            assert client.tokens + [output.token_id for output in life.held] == life.output_token_ids
            assert not (client.tokens and life.held), "only what comes first is held"
            if self.first_token == "at_once":
                assert not life.held
            elif life.phase in ("bridge", "decode") and life.attempt is life.request:
                has_joined = life.prefill_replica is None  # or decodes where it was prefilled
                if request.request_id not in self.moved:
                    assert bool(client.tokens) == (has_joined and bool(life.output_token_ids))
            if client.tokens:
                self.moved.add(request.request_id)

    def teardown(self):
        for replica in list(self.fleet.router.fleet):
            self.fleet.router.changes.undrain(replica)
            self.fleet.router.changes.set_role(replica, "mixed")
        self.fleet.tick()
        self.fleet.run(2000)
        self.fleet.now += 100
        self.fleet.tick()  # all that serve may have been removed: nothing else moves then
        self.fleet.run(2000)
        for request, client in self.asked:
            if client.error is None:
                assert client.tokens == answer(request), "a wrong answer, or none"
            elif not isinstance(client.error, InvalidRequest | Overloaded | StageUnavailable):
                assert isinstance(client.error, Cancelled) and request.request_id in self.cancelled
            assert client.tokens == answer(request)[: len(client.tokens)]
        self.fleet.assert_empty()


class AnyColocatedFleet(AnyFleet):
    shape, mode = (0, 3), "colocated"


class AnyReservingFleet(AnyFleet):
    first_token, admission = "at_once", "reserved"


class AnyReservingColocatedFleet(AnyColocatedFleet):
    admission = "reserved"


class AnyAutoFleet(AnyFleet):
    roles = "auto"


@pytest.mark.parametrize(
    "machine", [AnyFleet, AnyColocatedFleet, AnyReservingFleet, AnyReservingColocatedFleet, AnyAutoFleet]
)
def test_any_history_ends_in_the_known_answers(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=60, deadline=None))
