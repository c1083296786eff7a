import pytest

from ensemble.errors import Overloaded
from ensemble.scheduling.waiting_queue import WaitingQueue


def test_first_come_first_served_with_removal(make_request):
    queue = WaitingQueue(max_num_requests=10, max_num_tokens=1000)
    for request_id in (3, 1, 2):
        queue.add(make_request(request_id, 10), now=0.0)
    assert queue.remove(1).request_id == 1
    assert queue.remove(1) is None
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
