import pytest

from ensemble.errors import InternalError, InvalidRequest
from ensemble.scheduling.admission import DecodeAdmission


def make_admission(max_num_bridge_seqs=2, replicas=((10, 8),)):
    admission = DecodeAdmission(block_size=4, max_num_bridge_seqs=max_num_bridge_seqs)
    for replica, (num_blocks, max_num_seqs) in enumerate(replicas):
        admission.replica_up(replica, num_blocks, max_num_seqs)
    return admission


def promise(admission, request):
    assert admission.try_promise(request)


def request_ids(submission):
    return [handoff.request.request_id for handoff in submission.handoffs]


def test_prefill_runs_ahead_of_decode_by_the_bridge_bound_only(make_request):
    admission = make_admission(max_num_bridge_seqs=2)
    for request_id in range(2):
        promise(admission, make_request(request_id, 16, max_tokens=5))  # 5 blocks each: all of decode's room
    assert not admission.may_start(make_request(2, 4))
    admission.withdraw(0)
    promise(admission, make_request(2, 4))


def test_room_in_decode_allows_more_than_the_bridge_bound(make_request):
    admission = make_admission(max_num_bridge_seqs=1)
    started = 0
    while admission.try_promise(make_request(started, 4, max_tokens=5)):  # 2 blocks each
        started += 1
    assert started == 5


def test_places_in_decode_count_as_room_too(make_request):
    admission = make_admission(max_num_bridge_seqs=1, replicas=((10, 2),))
    promise(admission, make_request(0, 1))
    promise(admission, make_request(1, 1))
    assert not admission.may_start(make_request(2, 1))


def test_a_request_that_ends_with_its_first_token_needs_no_promise(make_request):
    admission = make_admission(max_num_bridge_seqs=1, replicas=())
    promise(admission, make_request(0, 16))
    promise(admission, make_request(1, 16, max_tokens=1))
    assert not admission.may_start(make_request(2, 16))
    admission.withdraw(1)
    admission.check_integrity()


def test_the_whole_life_is_reserved_and_the_head_waits_for_it(make_request, make_handoff):
    admission = make_admission(max_num_bridge_seqs=8)
    requests = [make_request(0, 16, max_tokens=9), make_request(1, 16, max_tokens=9), make_request(2, 1, max_tokens=2)]
    for request in requests:  # 6, 6 and 1 blocks
        promise(admission, request)
        admission.arrive(make_handoff(request))
    assert request_ids(admission.next_submission()) == [0]
    assert admission.next_submission() is None  # 2 would fit, but may not overtake 1
    assert admission.num_bridge_seqs == 2 and admission.num_bridge_blocks == 5
    admission.released(0, [0])
    assert request_ids(admission.next_submission()) == [1, 2]
    assert admission.num_promised_seqs == 0 and admission.num_decode_seqs == 2


def test_the_replica_with_the_most_free_blocks_is_chosen_late(make_request, make_handoff):
    admission = make_admission(max_num_bridge_seqs=8, replicas=((10, 8), (12, 8)))
    requests = [make_request(request_id, 12, max_tokens=5) for request_id in range(4)]  # 4 blocks each
    for request in requests:
        promise(admission, request)
        admission.arrive(make_handoff(request))
    submissions = [admission.next_submission() for _ in range(4)]
    assert [(s.replica, request_ids(s)) for s in submissions] == [(1, [0]), (0, [1]), (1, [2]), (0, [3])]
    assert admission.next_submission() is None


def test_cancel_says_who_has_to_act(make_request, make_handoff):
    admission = make_admission(max_num_bridge_seqs=8)
    requests = [make_request(request_id, 16, max_tokens=9) for request_id in range(3)]
    handoffs = [make_handoff(request) for request in requests]
    for request in requests:
        promise(admission, request)
    admission.arrive(handoffs[0])
    admission.next_submission()
    admission.arrive(handoffs[1])
    assert admission.cancel(0) == ("decode", 0)
    assert admission.cancel(1) == ("bridge", handoffs[1])
    assert admission.cancel(2) == ("promised",)
    assert [admission.cancel(request_id) for request_id in (1, 2, 3)] == [None, None, None]
    assert admission.num_free_blocks == 4  # the sequence in decode holds its blocks until the replica reports
    admission.released(0, [0])
    assert admission.num_free_blocks == 10 and admission.num_promised_seqs == 0


def test_a_withdrawn_request_cannot_arrive(make_request, make_handoff):
    admission = make_admission()
    request = make_request(0, 4)
    promise(admission, request)
    admission.withdraw(0)
    with pytest.raises(InternalError):
        admission.arrive(make_handoff(request))


def test_a_lost_replica_gives_up_its_sequences_and_the_bridge_waits(make_request, make_handoff):
    admission = make_admission(max_num_bridge_seqs=8)
    requests = [make_request(request_id, 16, max_tokens=9) for request_id in range(2)]
    for request in requests:
        promise(admission, request)
        admission.arrive(make_handoff(request))
    admission.next_submission()
    assert admission.replica_down(0) == [0]
    assert admission.next_submission() is None
    admission.replica_up(0, 10, 8)
    admission.released(0, [0])  # late word of the predecessor
    assert request_ids(admission.next_submission()) == [1]
    admission.check_integrity()


def test_a_request_no_pool_could_hold_is_refused(make_request):
    admission = make_admission()
    admission.check(make_request(0, 20, max_tokens=21))
    with pytest.raises(InvalidRequest, match=r"max_tokens = 42.*40 tokens"):
        admission.check(make_request(0, 20, max_tokens=22))
    admission.check(make_request(0, 100, max_tokens=1))


def test_with_a_host_pool_expected_growth_is_admitted(make_request, make_handoff):
    """4 blocks at full length, 2 expected: twice as many come in, less the watermark, as without a host pool."""
    requests = [make_request(request_id, 4, max_tokens=13) for request_id in range(20)]
    num_admitted = {}
    for num_host_blocks in (0, 100):
        admission = DecodeAdmission(
            block_size=4, max_num_bridge_seqs=20, expected_kv_tokens=lambda request: 8, watermark=0.1
        )
        admission.replica_up(0, 20, 100, num_host_blocks)
        for request in requests:
            promise(admission, request)
            admission.arrive(make_handoff(request))
        submission = admission.next_submission()
        num_admitted[num_host_blocks] = len(submission.handoffs)
        admission.check_integrity()
        admission.released(0, request_ids(submission))
        assert admission.num_decode_seqs == 0
        assert admission.num_free_blocks == (18 if num_host_blocks else 20)
    assert num_admitted == {0: 5, 100: 9}


def test_a_small_host_pool_slows_admission(make_request, make_handoff):
    """All that are admitted can be brought to their end: at full length, the longest twice, they fit both pools."""
    admission = DecodeAdmission(block_size=4, max_num_bridge_seqs=20, expected_kv_tokens=lambda request: 4)
    admission.replica_up(0, 20, 100, num_host_blocks=8)
    for request_id in range(20):
        request = make_request(request_id, 4, max_tokens=13)
        promise(admission, request)
        admission.arrive(make_handoff(request))
    assert len(admission.next_submission().handoffs) == 6


def test_a_request_as_large_as_the_pool_runs_alone(make_request, make_handoff):
    admission = DecodeAdmission(
        block_size=4, max_num_bridge_seqs=20, expected_kv_tokens=lambda request: 80, watermark=0.2
    )
    admission.replica_up(0, 20, 100, num_host_blocks=8)
    request = make_request(0, 40, max_tokens=41)
    promise(admission, request)
    admission.arrive(make_handoff(request))
    assert request_ids(admission.next_submission()) == [0]


def test_a_prompt_computed_by_a_decode_replica_holds_its_whole_life_there(make_request):
    admission = make_admission(replicas=((10, 2), (10, 2)))
    assert admission.try_start_at(1, make_request(0, 16, max_tokens=9))  # 6 blocks
    assert not admission.try_start_at(1, make_request(1, 16, max_tokens=9))
    assert admission.try_start_at(1, make_request(2, 4, max_tokens=1))
    assert not admission.try_start_at(1, make_request(3, 1, max_tokens=1))  # blocks are left, places are not
    assert not admission.try_start_at(2, make_request(4, 1))  # there is no such replica
    assert admission.num_free_blocks == 20 - 6 - 1 and admission.cancel(0) == ("decode", 1)
    admission.released(1, [0, 2])
    assert admission.try_start_at(1, make_request(1, 16, max_tokens=9))
    admission.check_integrity()


def test_what_prefill_was_promised_is_not_given_to_a_prompt_computed_in_decode(make_request):
    admission = make_admission(max_num_bridge_seqs=2)
    promise(admission, make_request(0, 16, max_tokens=9))  # 6 of 10 blocks
    assert not admission.try_start_at(0, make_request(1, 16, max_tokens=5))  # 5 blocks
    assert admission.try_start_at(0, make_request(2, 16, max_tokens=1))  # 4 blocks


def test_who_waits_in_the_bridge_goes_before_prompts_computed_in_decode(make_request, make_handoff):
    admission = make_admission(max_num_bridge_seqs=2, replicas=((10, 1),))
    assert admission.try_start_at(0, make_request(0, 4, max_tokens=5))
    waiting = make_request(1, 4, max_tokens=5)
    promise(admission, waiting)
    admission.arrive(make_handoff(waiting))
    assert admission.next_submission() is None  # the only place is taken
    admission.released(0, [0])
    assert not admission.try_start_at(0, make_request(2, 4, max_tokens=5))
    assert request_ids(admission.next_submission()) == [1]
