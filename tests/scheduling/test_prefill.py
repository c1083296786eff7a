import pytest

from ensemble.errors import InvalidRequest, Overloaded
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefiller import Limits


def always(replica, request):
    return True


def make_scheduler(**overrides):
    arguments = {
        "block_size": 4,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
        "max_batches_in_flight": 2,
        "max_queue_requests": 100,
        "max_queue_tokens": 10_000,
    }
    return PrefillScheduler(**(arguments | overrides))


def bring_up(scheduler, replica, num_blocks=100, limits=None):
    """Returns the credit that the replica's requests hold."""
    credits = Credits(num_blocks)
    assert scheduler.replica_up(replica, credits, limits or scheduler.limits) == []
    return credits


def spans(batch):
    return [(chunk.request_id, chunk.start, chunk.length) for chunk in batch.chunks]


def test_behind_a_prompt_that_is_held_another_replica_gets_the_next(make_request):
    """Though that one, with less to do, was asked before."""
    scheduler = make_scheduler()
    bring_up(scheduler, 0)
    bring_up(scheduler, 1)
    for index in range(2):
        scheduler.add(make_request(request_id=index, prompt_len=8), 0.0)

    def may_start(replica, request):
        if replica == 1 and request.request_id == 0:
            scheduler.hold(0, 4)
            return True
        return replica == 0 and request.request_id == 1

    batch = scheduler.next_batch(0.0, may_start)
    assert batch is not None and (batch.replica, spans(batch)) == (0, [(1, 0, 8)])
    assert scheduler.unsent_at(0) == 1 and scheduler.unsent_at(1) is None
    scheduler.resume(0, 4)
    assert spans(scheduler.next_batch(0.0, may_start)) == [(0, 4, 4)]
    assert scheduler.unsent_at(0) is None


def test_short_prompts_share_a_batch_up_to_the_token_budget(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0)
    for request_id, prompt_len in enumerate([10, 10, 10, 10]):
        scheduler.add(make_request(request_id, prompt_len), now=0.0)
    batch = scheduler.next_batch(0.0, always)
    assert spans(batch) == [(0, 0, 10), (1, 0, 10), (2, 0, 10), (3, 0, 2)]
    assert all(chunk.is_first for chunk in batch.chunks)
    assert scheduler.num_waiting == 0 and scheduler.num_waiting_tokens == 0


def test_the_number_of_chunks_is_bounded(make_request):
    scheduler = make_scheduler(max_num_seqs=2)
    bring_up(scheduler, 0)
    for request_id in range(3):
        scheduler.add(make_request(request_id, 1), now=0.0)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 0, 1), (1, 0, 1)]


def test_a_long_prompt_is_chunked_at_one_replica_and_stays_ahead(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0)
    scheduler.add(make_request(0, 70), now=0.0)
    scheduler.add(make_request(1, 8), now=0.0)
    first = scheduler.next_batch(0.0, always)
    second = scheduler.next_batch(0.0, always)  # while the first is in flight
    assert spans(first) == [(0, 0, 32)] and spans(second) == [(0, 32, 32)]
    assert first.chunks[0].is_first and not second.chunks[0].is_first
    assert scheduler.next_batch(0.0, always) is None  # two in flight
    scheduler.batch_done(0, first.batch_id)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 64, 6), (1, 0, 8)]


def test_blocks_are_held_from_the_first_chunk_until_the_release(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0, num_blocks=10)
    scheduler.add(make_request(0, 33), now=0.0)  # 9 blocks
    scheduler.add(make_request(1, 8), now=0.0)  # 2 blocks
    scheduler.add(make_request(2, 4), now=0.0)  # would fit, but may not overtake
    batches = [scheduler.next_batch(0.0, always) for _ in range(2)]
    assert [spans(batch) for batch in batches] == [[(0, 0, 32)], [(0, 32, 1)]]
    for batch in batches:
        scheduler.batch_done(0, batch.batch_id)
    assert scheduler.next_batch(0.0, always) is None
    scheduler.released(0, [0])
    assert spans(scheduler.next_batch(0.0, always)) == [(1, 0, 8), (2, 0, 4)]


def test_a_head_that_fits_one_replica_only_goes_there(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0, num_blocks=4)
    bring_up(scheduler, 1, num_blocks=8)
    scheduler.add(make_request(0, 20), now=0.0)
    assert scheduler.next_batch(0.0, always).replica == 1


def test_the_least_loaded_replica_gets_the_next_request(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0)
    bring_up(scheduler, 1)
    scheduler.add(make_request(0, 100), now=0.0)
    first = scheduler.next_batch(0.0, always)
    scheduler.add(make_request(1, 8), now=0.0)
    second = scheduler.next_batch(0.0, always)
    assert {first.replica, second.replica} == {0, 1}
    assert spans(second) == [(1, 0, 8)]
    assert scheduler.next_batch(0.0, always).replica == first.replica  # the long prompt goes on where its blocks are


def test_the_bridge_holds_back_new_requests_but_not_begun_ones(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0)
    scheduler.add(make_request(0, 40), now=0.0)
    scheduler.add(make_request(1, 8), now=0.0)
    scheduler.next_batch(0.0, always)
    assert spans(scheduler.next_batch(0.0, lambda replica, request: False)) == [(0, 32, 8)]
    assert scheduler.next_batch(0.0, lambda replica, request: False) is None
    assert scheduler.num_waiting == 1


def test_nothing_more_is_dispatched_of_what_is_cancelled(make_request):
    scheduler = make_scheduler()
    credits = bring_up(scheduler, 3)
    scheduler.add(make_request(0, 40), now=0.0)
    scheduler.add(make_request(1, 40), now=0.0)
    scheduler.next_batch(0.0, always)
    assert scheduler.num_waiting == 1
    for _ in range(2):
        scheduler.cancel(1)
        assert scheduler.num_waiting == 0
    scheduler.cancel(0)
    assert scheduler.next_batch(0.0, always) is None  # its second chunk is not dispatched
    scheduler.check_integrity()
    assert credits.request_ids == [0]
    scheduler.released(3, [0])
    scheduler.cancel(0)
    assert credits.request_ids == []


def test_a_lost_replica_gives_up_its_requests_and_the_queue_goes_on(make_request):
    scheduler = make_scheduler()
    credits = bring_up(scheduler, 0)
    for request_id in range(3):
        scheduler.add(make_request(request_id, 30), now=0.0)
    batch = scheduler.next_batch(0.0, always)
    assert credits.request_ids == [0, 1]
    scheduler.replica_down(0)
    scheduler.cancel(0)
    assert scheduler.next_batch(0.0, always) is None
    scheduler.batch_done(0, batch.batch_id)  # word of it that came late
    bring_up(scheduler, 0)
    scheduler.released(0, [0])
    assert spans(scheduler.next_batch(0.0, always)) == [(2, 0, 30)]
    scheduler.check_integrity()


def test_a_prompt_no_pool_could_hold_is_refused(make_request):
    scheduler = make_scheduler()
    scheduler.add(make_request(0, 41), now=0.0)
    scheduler.add(make_request(1, 40), now=0.0)
    assert scheduler.replica_up(0, Credits(10), scheduler.limits) == [0]
    with pytest.raises(InvalidRequest, match=r"input_ids.*41.*40 tokens"):
        scheduler.add(make_request(2, 41), now=0.0)
    scheduler.replica_down(0)
    with pytest.raises(InvalidRequest):  # the replica comes back with the pool it had
        scheduler.add(make_request(2, 41), now=0.0)
    assert scheduler.num_waiting == 1


def test_a_full_queue_refuses(make_request):
    scheduler = make_scheduler(max_queue_requests=1)
    scheduler.add(make_request(0, 4), now=0.0)
    with pytest.raises(Overloaded):
        scheduler.add(make_request(1, 4), now=0.0)


def test_a_long_prompt_leaves_room_for_short_ones(make_request):
    """A 30k-token prompt holds short ones up for no more than the batch that is running."""
    scheduler = make_scheduler(max_num_batched_tokens=2048, max_long_tokens=1024, max_queue_tokens=100_000)
    bring_up(scheduler, 0, num_blocks=100_000)
    scheduler.add(make_request(0, 30_000), now=0.0)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 0, 2048)]  # nobody else wants the rest
    scheduler.add(make_request(1, 30_000), now=1.0)
    scheduler.add(make_request(2, 100), now=1.0)
    scheduler.add(make_request(3, 500), now=1.0)
    assert spans(scheduler.next_batch(1.0, always)) == [(0, 2048, 1448), (2, 0, 100), (3, 0, 500)]


def test_short_prompts_do_not_take_the_blocks_that_a_long_one_waits_for(make_request):
    scheduler = make_scheduler(max_long_tokens=16)
    bring_up(scheduler, 0, num_blocks=20)
    scheduler.add(make_request(0, 40), now=0.0)  # 10 blocks
    scheduler.add(make_request(1, 50), now=0.0)  # 13 blocks
    scheduler.add(make_request(2, 4), now=0.0)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 0, 32)]
    scheduler.next_batch(0.0, always)
    scheduler.released(0, [0])
    scheduler.batch_done(0, 0)
    assert spans(scheduler.next_batch(0.0, always)) == [(1, 0, 28), (2, 0, 4)]


def test_the_policy_chooses_who_starts(make_request):
    scheduler = make_scheduler(policy=QueuePolicy("priority", aging_s=5.0))
    bring_up(scheduler, 0)
    scheduler.add(make_request(0, 32), now=0.0, hints=Hints(priority=2))
    scheduler.add(make_request(1, 32), now=4.0, hints=Hints(priority=1))
    scheduler.add(make_request(2, 32), now=11.0, hints=Hints(priority=0))
    order = []
    for _ in range(3):
        batch = scheduler.next_batch(11.0, always)
        order.append(batch.chunks[0].request_id)
        scheduler.batch_done(0, batch.batch_id)
    assert order == [1, 0, 2]  # 4 + 5 < 0 + 10 < 11: a class is worth 5 s of waiting


def test_a_prompt_goes_where_its_prefix_is_cached_and_costs_only_the_rest(make_request):
    scheduler = make_scheduler(num_cached_tokens=lambda replica, request: 24 if replica == 1 else 0)
    for replica in range(3):
        bring_up(scheduler, replica)
    for request_id in range(3):
        scheduler.add(make_request(request_id, 30), now=0.0)
    first = scheduler.next_batch(0.0, always)
    assert first.replica == 1 and spans(first) == [(0, 24, 6), (1, 24, 6), (2, 24, 6)]
    assert all(chunk.is_first for chunk in first.chunks)


def test_a_cached_prefix_does_not_outweigh_any_load(make_request):
    scheduler = make_scheduler(num_cached_tokens=lambda replica, request: 8 if replica == 1 else 0)
    for replica in range(2):
        bring_up(scheduler, replica)
    scheduler.add(make_request(0, 40), now=0.0)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 8, 32)]
    scheduler.add(make_request(1, 20), now=0.0)
    second = scheduler.next_batch(0.0, always)
    assert second.replica == 0 and spans(second) == [(1, 0, 20)]


def test_a_decoding_replica_takes_short_prompts_only_while_the_others_are_busy(make_request):
    scheduler = make_scheduler()
    decoding = bring_up(scheduler, 7, limits=Limits(8, 1, max_prompt_len=10, stays=True))
    bring_up(scheduler, 0)

    def may_start(replica, request):
        if replica == 7:
            decoding.hold(request.request_id, 1)
        return True

    for request_id, prompt_len in enumerate([32, 32, 10, 6, 11]):
        scheduler.add(make_request(request_id, prompt_len), now=0.0)
    first, second, third = (scheduler.next_batch(0.0, may_start) for _ in range(3))
    assert [(each.replica, spans(each)) for each in (first, second)] == [(0, [(0, 0, 32)]), (0, [(1, 0, 32)])]
    assert (third.replica, spans(third)) == (7, [(2, 0, 8)])  # within its own budget
    assert scheduler.next_batch(0.0, may_start) is None  # one batch at a time
    scheduler.batch_done(7, third.batch_id)
    fourth = scheduler.next_batch(0.0, may_start)
    assert (fourth.replica, spans(fourth)) == (7, [(2, 8, 2), (3, 0, 6)])
    scheduler.batch_done(7, fourth.batch_id)
    assert scheduler.next_batch(0.0, may_start) is None  # the head is too long for it, and nothing overtakes the head
    scheduler.batch_done(0, first.batch_id)
    assert scheduler.next_batch(0.0, may_start).replica == 0
    scheduler.check_integrity()


def test_a_prompt_that_only_a_decoding_replica_would_refuse_is_queued(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 7, limits=Limits(8, 1, max_prompt_len=10, stays=True))
    with pytest.raises(InvalidRequest):
        scheduler.add(make_request(0, 11), now=0.0)
    bring_up(scheduler, 0, num_blocks=10)
    scheduler.add(make_request(0, 40), now=0.0)


def test_what_decodes_at_a_replica_takes_the_room_of_its_prompts(make_request):
    scheduler = make_scheduler()
    credits = bring_up(scheduler, 0, num_blocks=10)
    credits.hold(99, 8)  # decodes there
    scheduler.add(make_request(0, 9), now=0.0)  # 3 blocks
    assert scheduler.next_batch(0.0, always) is None
    credits.release(99)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 0, 9)]


def test_a_request_that_comes_again_goes_first_and_is_prefilled_with_what_it_had(make_request):
    scheduler = make_scheduler(max_queue_requests=1)
    bring_up(scheduler, 0)
    scheduler.add(make_request(0, 20), now=0.0)
    scheduler.add(make_request(1, 20, num_resumed_tokens=15), now=9.0, is_again=True)
    first = scheduler.next_batch(9.0, always)
    assert spans(first) == [(1, 0, 32)]
    assert spans(scheduler.next_batch(9.0, always)) == [(1, 32, 3), (0, 0, 20)]
    scheduler.check_integrity()


def test_a_request_that_comes_again_longer_than_any_live_pool_waits_for_its_replica(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0, num_blocks=20)
    bring_up(scheduler, 1, num_blocks=10)
    scheduler.replica_down(0)
    scheduler.add(make_request(0, 38, num_resumed_tokens=4), now=0.0, is_again=True)
    scheduler.add(make_request(1, 60), now=0.0)
    scheduler.add(make_request(2, 8), now=0.0)
    assert spans(scheduler.next_batch(0.0, always)) == [(2, 0, 8)]  # neither stands before it
    assert scheduler.next_batch(0.0, always) is None
    bring_up(scheduler, 0, num_blocks=20)
    batch = scheduler.next_batch(0.0, always)
    assert batch.replica == 0 and spans(batch) == [(0, 0, 32)]
    scheduler.batch_done(0, batch.batch_id)
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 32, 10)]
    scheduler.released(0, [0])
    assert spans(scheduler.next_batch(0.0, always)) == [(1, 0, 32)]
    scheduler.check_integrity()


def test_a_replica_that_no_longer_takes_prompts_finishes_those_that_have_begun(make_request):
    scheduler = make_scheduler()
    credits = bring_up(scheduler, 0)
    scheduler.add(make_request(0, 40), now=0.0)
    scheduler.add(make_request(1, 8), now=0.0)
    first = scheduler.next_batch(0.0, always)
    assert scheduler.unfinished(0) == [0, 0]  # it has begun, and is in flight
    assert scheduler.set_limits(0, None) == []
    assert spans(scheduler.next_batch(0.0, always)) == [(0, 32, 8)]
    assert scheduler.next_batch(0.0, always) is None and scheduler.num_waiting == 1
    scheduler.batch_done(0, first.batch_id)
    assert scheduler.unfinished(0) == [0]
    assert credits.request_ids == [0]
    assert scheduler.set_limits(0, scheduler.limits) == []
    assert spans(scheduler.next_batch(0.0, always)) == [(1, 0, 8)]
    scheduler.check_integrity()


def test_a_role_change_refuses_what_no_replica_could_take_any_more(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0, num_blocks=20)
    bring_up(scheduler, 1, num_blocks=10)
    scheduler.add(make_request(0, 60), now=0.0)
    scheduler.add(make_request(1, 8), now=0.0)
    assert scheduler.set_limits(0, None) == [0]
    with pytest.raises(InvalidRequest):
        scheduler.add(make_request(2, 41), now=0.0)
    assert scheduler.next_batch(0.0, always).replica == 1


def test_a_removed_replica_does_not_count_as_one_that_comes_back(make_request):
    scheduler = make_scheduler()
    bring_up(scheduler, 0, num_blocks=20)
    bring_up(scheduler, 1, num_blocks=10)
    scheduler.replica_down(0)
    scheduler.add(make_request(0, 60), now=0.0)
    scheduler.replica_removed(0)
    assert scheduler.max_prompt_len == 40
    with pytest.raises(InvalidRequest):
        scheduler.add(make_request(1, 60), now=0.0)
