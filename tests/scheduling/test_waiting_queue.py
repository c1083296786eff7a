import pytest

from ensemble.errors import Overloaded
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.waiting_queue import WaitingQueue


def test_first_come_first_served_with_removal(make_request):
    queue = WaitingQueue(max_num_requests=10, max_num_tokens=1000)
    for request_id in (3, 1, 2):
        queue.add(make_request(request_id, 10), now=0.0)
    for _ in range(2):
        queue.remove(1)
        assert len(queue) == 2
    for request_id in (3, 2):
        assert queue.head(now=1.0).request_id == request_id
        queue.start(request_id, now=1.0)
    assert queue.head(now=1.0) is None and queue.num_tokens == 0


def test_both_bounds_refuse_and_leave_the_queue_as_it_was(make_request):
    queue = WaitingQueue(max_num_requests=2, max_num_tokens=100)
    queue.add(make_request(1, 60), now=0.0)
    with pytest.raises(Overloaded, match="60 prompt tokens are waiting"):
        queue.add(make_request(2, 41), now=0.0)
    queue.add(make_request(3, 40), now=0.0)
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        queue.add(make_request(4, 1), now=0.0)
    assert len(queue) == 2 and queue.num_tokens == 100
    queue.check_integrity()


def test_an_empty_queue_takes_a_prompt_longer_than_its_bound(make_request):
    queue = WaitingQueue(max_num_requests=2, max_num_tokens=100)
    queue.add(make_request(1, 500), now=0.0)
    queue.check_integrity()


def test_the_retry_hint_follows_the_drain_rate(make_request):
    """A queue that drains 200 tokens/s is asked for 1,000 tokens too many: room after about 5 s."""
    queue = WaitingQueue(max_num_requests=10_000, max_num_tokens=2000)
    now = 0.0
    for request_id in range(600):
        queue.add(make_request(request_id, 20), now)
        queue.start(request_id, now)
        now += 0.1
    queue.add(make_request(1000, 2000), now)
    with pytest.raises(Overloaded) as refused:
        queue.add(make_request(1001, 1000), now)
    assert refused.value.retry_after_s == pytest.approx(5.0, rel=0.05)


def test_the_retry_hint_is_long_when_nothing_drains(make_request):
    queue = WaitingQueue(max_num_requests=1, max_num_tokens=100)
    queue.add(make_request(1, 1), now=0.0)
    with pytest.raises(Overloaded) as refused:
        queue.add(make_request(2, 1), now=5.0)
    assert refused.value.retry_after_s == 60.0


def test_what_comes_again_goes_first_in_its_order_and_is_not_refused(make_request):
    queue = WaitingQueue(max_num_requests=1, max_num_tokens=100, policy=QueuePolicy("sjf"))
    queue.add(make_request(1, 1), now=0.0)
    for request_id, prompt_len in ((7, 90), (3, 50), (5, 20)):
        queue.add(make_request(request_id, prompt_len), now=1.0, is_again=True)
    with pytest.raises(Overloaded):
        queue.add(make_request(2, 1), now=1.0)
    order = []
    while (head := queue.head(now=100.0)) is not None:  # also before those that have waited past max_wait_s
        order.append(head.request_id)
        queue.check_integrity()
        queue.start(head.request_id, now=100.0)
    assert order == [7, 3, 5, 1] and queue.num_tokens == 0


def test_what_comes_again_is_not_charged_to_its_tenant_twice(make_request):
    queue = WaitingQueue(max_num_requests=10, max_num_tokens=1000, policy=QueuePolicy("fair"))
    for request_id, tenant in enumerate("abab"):
        queue.add(make_request(request_id, 100 if request_id == 1 else 80), now=0.0, hints=Hints(tenant=tenant))
    queue.start(0, now=0.0)
    queue.start(1, now=0.0)
    queue.add(make_request(4, 80), now=0.0, hints=Hints(tenant="a"), is_again=True)
    queue.start(4, now=0.0)
    assert queue.head(now=0.0).request_id == 2  # a was served 80 tokens, b 100


@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "edf", "fair"])
def test_what_only_a_lost_replica_could_take_stands_before_nobody_until_it_is_back(make_request, name):
    queue = WaitingQueue(max_num_requests=10, max_num_tokens=1000, policy=QueuePolicy(name), long_prompt_len=30)
    queue.add(make_request(0, 50), now=0.0)
    queue.add(make_request(1, 45), now=0.0, is_again=True)
    queue.hold_back(40)
    queue.add(make_request(2, 60), now=1.0)  # held back from the start
    queue.add(make_request(3, 40), now=1.0)
    assert queue.head(now=1.0).request_id == 3
    queue.remove(2)
    queue.start(3, now=1.0)
    assert queue.head(now=1.0) is None and len(queue) == 2 and queue.num_tokens == 95
    queue.check_integrity()
    queue.hold_back(None)
    order = []
    while (head := queue.head(now=2.0)) is not None:
        order.append(head.request_id)
        queue.start(head.request_id, now=2.0)
    assert order == [1, 0]


def test_who_was_held_back_keeps_its_place(make_request):
    queue = WaitingQueue(max_num_requests=10, max_num_tokens=1000)
    for request_id, prompt_len in enumerate((10, 50, 10)):
        queue.add(make_request(request_id, prompt_len), now=float(request_id))
    queue.hold_back(40)
    queue.hold_back(None)
    order = []
    while (head := queue.head(now=3.0)) is not None:
        order.append(head.request_id)
        queue.start(head.request_id, now=3.0)
    assert order == [0, 1, 2]


@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "edf", "fair"])
def test_who_waits_for_another_to_compute_the_prompt_stands_before_nobody_and_keeps_its_place(make_request, name):
    queue = WaitingQueue(max_num_requests=5, max_num_tokens=1000, policy=QueuePolicy(name))
    for request_id in (1, 2, 3):
        queue.add(make_request(request_id, 20), 0.0, Hints(num_cached_tokens=16), is_sharing=True)
    assert queue.num_tokens == 12
    queue.add(make_request(4, 20), now=1.0)
    queue.add(make_request(5, 50), now=1.0, is_sharing=True)
    with pytest.raises(Overloaded, match="5 requests are waiting"):
        queue.add(make_request(6, 1), now=1.0)
    queue.hold_back(40)
    assert queue.head(now=1.0).request_id == 4
    queue.remove(2)
    for request_id in (3, 1, 2, 5):  # 2 is gone, and 5 is too long for who is there
        queue.share(request_id)
    queue.check_integrity()
    order = []
    while (head := queue.head(now=1.0)) is not None:
        order.append(head.request_id)
        queue.start(head.request_id, now=1.0)
    assert order == [1, 3, 4] and len(queue) == 1
    queue.hold_back(None)
    assert queue.head(now=1.0).request_id == 5
