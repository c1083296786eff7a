import pytest

from ensemble.errors import InternalError, InvalidRequest
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import DecodeLimits, Decoders

SOURCE = 9  # a replica that only prefills


def make_admission(num_before_it_is_long=2, replicas=((10, 8),), watermark=0.0, **settings):
    """Of which so many may be promised beyond what there is room for: one more would wait for too long."""
    admission = DecodeAdmission(
        Decoders(watermark),
        block_size=4,
        max_bridge_wait_s=1.0,
        wait_s=lambda num_blocks: 2.0 if admission.num_promised_seqs >= num_before_it_is_long else 0.5,
        **settings,
    )
    for replica, (num_blocks, max_num_seqs) in enumerate(replicas):
        bring_up(admission, replica, num_blocks, max_num_seqs)
    return admission


def bring_up(admission, replica, num_blocks=10, max_num_seqs=8, num_host_blocks=0):
    """Returns the credit that the replica's requests hold."""
    credits = Credits(num_blocks)
    admission.decoders.replica_up(replica, credits, DecodeLimits(max_num_seqs, num_host_blocks))
    return credits


def promise(admission, request):
    assert admission.may_start(request)
    admission.promise(request)


def wait_in_bridge(admission, *requests, source=SOURCE):
    for request in requests:
        promise(admission, request)
        admission.arrive(request.request_id, source)


def test_prefill_runs_ahead_of_decode_by_the_bridge_bound_only(make_request):
    admission = make_admission(num_before_it_is_long=2)
    for request_id in range(2):
        promise(admission, make_request(request_id, 16, max_tokens=5))  # 5 blocks each: all of decode's room
    assert not admission.may_start(make_request(2, 4))
    admission.withdraw(0)
    promise(admission, make_request(2, 4))


def test_room_in_decode_allows_more_than_the_bridge_bound(make_request):
    admission = make_admission(num_before_it_is_long=1)
    started = 0
    while admission.may_start(request := make_request(started, 4, max_tokens=5)):  # 2 blocks each
        admission.promise(request)
        started += 1
    assert started == 5


def test_places_in_decode_count_as_room_too(make_request):
    admission = make_admission(num_before_it_is_long=1, replicas=((10, 2),))
    promise(admission, make_request(0, 1))
    promise(admission, make_request(1, 1))
    assert not admission.may_start(make_request(2, 1))


def test_a_request_that_ends_with_its_first_token_needs_no_promise(make_request):
    admission = make_admission(num_before_it_is_long=1, replicas=())
    promise(admission, make_request(0, 16))
    promise(admission, make_request(1, 16, max_tokens=1))
    assert not admission.may_start(make_request(2, 16))
    admission.withdraw(1)
    admission.check_integrity()


def test_the_whole_life_is_reserved_and_the_head_waits_for_it(make_request):
    admission = make_admission(num_before_it_is_long=8, replicas=())
    credits = bring_up(admission, 0)
    requests = [make_request(0, 16, max_tokens=9), make_request(1, 16, max_tokens=9), make_request(2, 1, max_tokens=2)]
    wait_in_bridge(admission, *requests)  # 6, 6 and 1 blocks
    assert admission.next_submission().request_ids == [0]
    assert admission.next_submission() is None  # 2 would fit, but may not overtake 1
    assert admission.num_bridge_seqs == 2
    admission.decoders.released(0, [0])
    assert admission.next_submission().request_ids == [1, 2]
    assert admission.num_promised_seqs == 0 and credits.request_ids == [1, 2]


def test_the_replica_with_the_most_free_blocks_is_chosen_late(make_request):
    admission = make_admission(num_before_it_is_long=8, replicas=((10, 8), (12, 8)))
    requests = [make_request(request_id, 12, max_tokens=5) for request_id in range(4)]  # 4 blocks each
    wait_in_bridge(admission, *requests)
    submissions = [admission.next_submission() for _ in range(4)]
    assert [(s.replica, s.request_ids) for s in submissions] == [(1, [0]), (0, [1]), (1, [2]), (0, [3])]
    assert admission.next_submission() is None


def test_who_is_withdrawn_is_gone_from_decode_only_when_its_replica_says_so(make_request):
    admission = make_admission(num_before_it_is_long=8)
    requests = [make_request(request_id, 16, max_tokens=9) for request_id in range(3)]
    for request in requests:
        promise(admission, request)
    admission.arrive(0, SOURCE)
    admission.next_submission()
    admission.arrive(1, SOURCE)
    assert (admission.num_bridge_seqs, admission.num_promised_seqs) == (1, 2)
    for request_id in (0, 1, 2, 1, 3):
        admission.withdraw(request_id)
    assert (admission.num_bridge_seqs, admission.num_promised_seqs) == (0, 0)
    assert admission.decoders.replica_of(0) == 0 and admission.decoders.num_free_blocks == 4
    admission.decoders.released(0, [0])
    assert admission.decoders.replica_of(0) is None and admission.decoders.num_free_blocks == 10


def test_a_withdrawn_request_cannot_arrive(make_request):
    admission = make_admission()
    request = make_request(0, 4)
    promise(admission, request)
    admission.withdraw(0)
    with pytest.raises(InternalError):
        admission.arrive(request.request_id, SOURCE)


def test_a_lost_replica_gives_up_its_sequences_and_the_bridge_waits(make_request):
    admission = make_admission(num_before_it_is_long=8, replicas=())
    credits = bring_up(admission, 0)
    wait_in_bridge(admission, *(make_request(request_id, 16, max_tokens=9) for request_id in range(2)))
    admission.next_submission()
    assert credits.request_ids == [0]
    admission.decoders.replica_down(0)
    assert admission.decoders.replica_of(0) is None
    assert admission.next_submission() is None
    bring_up(admission, 0)
    admission.decoders.released(0, [0])  # late word of the predecessor
    assert admission.next_submission().request_ids == [1]
    admission.check_integrity()


def test_a_request_no_pool_could_hold_is_refused(make_request):
    admission = make_admission()
    admission.check(make_request(0, 20, max_tokens=21))
    with pytest.raises(InvalidRequest, match=r"max_tokens = 42.*40 tokens"):
        admission.check(make_request(0, 20, max_tokens=22))
    admission.check(make_request(0, 100, max_tokens=1))


@pytest.mark.parametrize(
    ("is_optimistic", "num_host_blocks", "num_admitted"), [(False, 0, 5), (False, 10, 6), (True, 0, 9), (True, 10, 14)]
)
def test_expected_growth_is_admitted_and_the_host_pool_filled_too(
    make_request, is_optimistic, num_host_blocks, num_admitted
):
    """4 blocks at full length, 2 expected; a watermark for optimists; with a host pool the longest fits twice."""
    requests = [make_request(request_id, 4, max_tokens=13) for request_id in range(20)]
    expected = (lambda request: 8) if is_optimistic else None
    admission = make_admission(20, (), expected_kv_tokens=expected, watermark=0.1 if is_optimistic else 0.0)
    credits = bring_up(admission, 0, 20, 100, num_host_blocks)
    wait_in_bridge(admission, *requests)
    submission = admission.next_submission()
    assert len(submission.request_ids) == num_admitted
    admission.check_integrity()
    admission.decoders.released(0, submission.request_ids)
    assert credits.num_requests == 0
    assert admission.decoders.num_free_blocks == (18 if is_optimistic else 20) + num_host_blocks


def test_a_request_as_large_as_the_pool_runs_alone(make_request):
    admission = make_admission(20, (), expected_kv_tokens=lambda request: 80, watermark=0.2)
    bring_up(admission, 0, 20, 100, num_host_blocks=8)
    request = make_request(0, 40, max_tokens=41)
    wait_in_bridge(admission, request)
    assert admission.next_submission().request_ids == [0]


def test_a_prompt_computed_by_a_decode_replica_holds_its_whole_life_there(make_request):
    admission = make_admission(replicas=((10, 2), (10, 2)))
    assert admission.try_start_at(1, make_request(0, 16, max_tokens=9))  # 6 blocks
    assert not admission.try_start_at(1, make_request(1, 16, max_tokens=9))
    assert admission.try_start_at(1, make_request(2, 4, max_tokens=1))
    assert not admission.try_start_at(1, make_request(3, 1, max_tokens=1))  # blocks are left, places are not
    assert not admission.try_start_at(2, make_request(4, 1))  # there is no such replica
    assert admission.decoders.num_free_blocks == 20 - 6 - 1 and admission.decoders.replica_of(0) == 1
    admission.decoders.released(1, [0, 2])
    assert admission.try_start_at(1, make_request(1, 16, max_tokens=9))
    admission.check_integrity()


def test_what_prefill_was_promised_is_not_given_to_a_prompt_computed_in_decode(make_request):
    admission = make_admission(num_before_it_is_long=2)
    promise(admission, make_request(0, 16, max_tokens=9))  # 6 of 10 blocks
    assert not admission.try_start_at(0, make_request(1, 16, max_tokens=5))  # 5 blocks
    assert admission.try_start_at(0, make_request(2, 16, max_tokens=1))  # 4 blocks


def test_who_waits_in_the_bridge_goes_before_prompts_computed_in_decode(make_request):
    admission = make_admission(num_before_it_is_long=2, replicas=((10, 1),))
    assert admission.try_start_at(0, make_request(0, 4, max_tokens=5))
    waiting = make_request(1, 4, max_tokens=5)
    wait_in_bridge(admission, waiting)
    assert admission.next_submission() is None  # the only place is taken
    admission.decoders.released(0, [0])
    assert not admission.try_start_at(0, make_request(2, 4, max_tokens=5))
    assert admission.next_submission().request_ids == [1]


def test_a_head_that_only_a_lost_replica_could_hold_stands_before_nobody(make_request):
    admission = make_admission(num_before_it_is_long=8, replicas=((10, 8), (20, 8)))
    admission.decoders.replica_down(1)
    wait_in_bridge(admission, make_request(0, 32, max_tokens=13), make_request(1, 16, max_tokens=9))  # 11 and 6 blocks
    assert admission.next_submission() == (0, [1])
    assert admission.next_submission() is None and admission.num_bridge_seqs == 1
    bring_up(admission, 1, num_blocks=20)
    assert admission.next_submission() == (1, [0])
    admission.check_integrity()


def test_a_request_that_has_to_be_alone_shares_its_replica_with_no_sequence(make_request):
    admission = make_admission(num_before_it_is_long=8)
    requests = [make_request(request_id, 4, max_tokens=5) for request_id in range(3)]
    admission.decoders.set_alone(1)
    wait_in_bridge(admission, *requests)
    for request_id in range(3):
        assert admission.next_submission() == (0, [request_id])
        assert admission.next_submission() is None
        admission.decoders.released(0, [request_id])
    admission.check_integrity()


def test_a_prompt_that_has_to_be_alone_starts_at_a_replica_only_when_that_is_empty(make_request):
    admission = make_admission()
    admission.decoders.set_alone(1)
    assert admission.try_start_at(0, make_request(0, 4, max_tokens=5))
    assert not admission.try_start_at(0, make_request(1, 4, max_tokens=5))
    admission.decoders.released(0, [0])
    assert admission.try_start_at(0, make_request(1, 4, max_tokens=5))
    assert not admission.try_start_at(0, make_request(2, 4, max_tokens=5))
    admission.decoders.clear_alone(1)  # it has got on: it was not its doing
    assert admission.try_start_at(0, make_request(2, 4, max_tokens=5))


@pytest.mark.parametrize("end", ["withdrawn", "released", "lost"])
def test_nothing_is_remembered_of_a_request_that_was_alone(make_request, end):
    admission = make_admission()
    request = make_request(0, 4, max_tokens=5)
    admission.decoders.set_alone(0)
    promise(admission, request)
    if end == "withdrawn":
        admission.withdraw(0)
    else:
        admission.arrive(0, SOURCE)
        admission.next_submission()
        if end == "released":
            admission.decoders.released(0, [0])
        else:
            admission.decoders.replica_down(0)
            bring_up(admission, 0)
    assert admission.try_start_at(0, request)
    assert admission.try_start_at(0, make_request(1, 4, max_tokens=5))


def test_a_closed_replica_gets_no_more_and_what_it_has_goes_on(make_request):
    admission = make_admission(num_before_it_is_long=1, replicas=((10, 8), (10, 8)))
    wait_in_bridge(admission, make_request(0, 16, max_tokens=9))
    assert admission.next_submission() == (0, [0])
    admission.decoders.set_open(0, False)
    assert admission.decoders.num_free_blocks == 10  # the other one's
    assert not admission.try_start_at(0, make_request(5, 1))
    wait_in_bridge(admission, make_request(1, 4, max_tokens=5))
    assert admission.next_submission() == (1, [1])
    admission.decoders.released(0, [0])
    wait_in_bridge(admission, make_request(2, 32, max_tokens=9))  # 10 blocks
    assert admission.next_submission() is None  # the only open one has 8 free
    admission.decoders.set_open(0, True)
    assert admission.next_submission() == (0, [2])
    admission.check_integrity()


def test_only_replicas_that_take_sequences_say_what_could_be_held(make_request):
    admission = make_admission(replicas=((10, 8), (20, 8)))
    request = make_request(0, 40, max_tokens=41)  # 20 blocks
    admission.check(request)
    admission.decoders.replica_down(1)
    admission.check(request)  # it comes back
    admission.decoders.replica_removed(1)
    with pytest.raises(InvalidRequest):
        admission.check(request)
    bring_up(admission, 1, num_blocks=20)
    admission.check(request)
    admission.decoders.set_open(1, False)
    with pytest.raises(InvalidRequest):
        admission.check(request)


def test_what_goes_on_where_it_was_prefilled_gives_its_lease_for_its_life(make_request):
    """Source and reader are one replica: 5 blocks leased and 6 wanted fit 6, beside 4 that another one holds."""
    admission = make_admission(replicas=())
    credits = bring_up(admission, 0)
    request = make_request(0, 20, max_tokens=5)
    promise(admission, request)
    credits.hold(0, 5)  # as PrefillScheduler does
    credits.hold(7, 4)
    admission.arrive(0, source=0)
    assert admission.next_submission() == (0, [0])
    assert credits.held(0) == 6 and credits.free_blocks == 0
    admission.check_integrity()
    admission.decoders.released(0, [0])
    assert credits.request_ids == [7]


def test_who_waits_for_leased_blocks_does_not_hold_up_those_who_leased_them(make_request):
    """Both replicas only prefilled until now; the head's blocks are at neither."""
    admission = make_admission(num_before_it_is_long=8, replicas=())
    pools = [bring_up(admission, replica) for replica in range(2)]
    wait_in_bridge(admission, make_request(0, 16, max_tokens=9))  # 6 blocks
    for replica, credits in enumerate(pools):
        credits.hold(1 + replica, 5)
        wait_in_bridge(admission, make_request(1 + replica, 20, max_tokens=5), source=replica)
    assert [admission.next_submission() for _ in range(3)] == [(0, [1]), (1, [2]), None]
    admission.decoders.released(1, [2])
    assert admission.next_submission() == (1, [0])
    admission.check_integrity()


def test_prompts_at_a_replica_take_the_room_of_its_sequences(make_request):
    admission = make_admission(replicas=())
    credits = bring_up(admission, 0)
    credits.hold(7, 5)  # a prompt that is computed there
    wait_in_bridge(admission, make_request(0, 16, max_tokens=9))  # 6 blocks
    assert admission.decoders.num_free_blocks == 5 and admission.next_submission() is None
    credits.release(7)
    assert admission.next_submission() == (0, [0])


def test_a_reader_that_cannot_map_the_source_is_passed_over(make_request):
    admission = make_admission(num_before_it_is_long=8, replicas=((20, 8), (10, 8)))
    admission.decoders.cannot_reach(SOURCE, 0)
    wait_in_bridge(admission, make_request(0, 16, max_tokens=9))
    wait_in_bridge(admission, make_request(1, 16, max_tokens=9), source=8)
    assert admission.next_submission() == (1, [0])
    assert admission.next_submission() == (0, [1])
    assert admission.decoders.is_reachable_from(SOURCE)
    admission.decoders.cannot_reach(SOURCE, 1)
    assert not admission.decoders.is_reachable_from(SOURCE) and admission.decoders.is_reachable_from(8)
    wait_in_bridge(admission, make_request(2, 4, max_tokens=5))
    wait_in_bridge(admission, make_request(3, 4, max_tokens=5), source=8)
    assert admission.next_submission() == (0, [3])  # 2 can go nowhere, and stands before nobody
    admission.decoders.replica_down(1)
    bring_up(admission, 1)  # its next life may reach it
    assert admission.next_submission() == (1, [2])
    admission.check_integrity()
