import random

from ensemble.scheduling.deadlines import Deadlines


def test_requests_expire_in_the_order_of_their_deadlines_and_only_when_they_have_come():
    deadlines = Deadlines()
    for request_id, deadline in [(1, 5.0), (2, 3.0), (3, 9.0), (4, 3.5)]:
        deadlines.add(request_id, deadline)
    deadlines.remove(4)
    deadlines.remove(77)  # had no deadline
    assert deadlines.take_expired(2.9) == []
    assert deadlines.next == 3.0
    assert deadlines.take_expired(5.0) == [2, 1]
    deadlines.remove(3)
    assert deadlines.next is None and deadlines.take_expired(100.0) == []


def test_what_has_ended_is_forgotten():
    """Long deadlines of requests that ended long ago take no memory."""
    rng = random.Random(1)
    deadlines = Deadlines()
    live = set()
    for request_id in range(5000):
        deadlines.add(request_id, 1e6 + rng.random())
        live.add(request_id)
        if len(live) > 20:
            done = rng.choice(sorted(live))
            live.remove(done)
            deadlines.remove(done)
    assert len(deadlines) == len(live) == 20
    assert len(deadlines._heap) < 100
    assert sorted(deadlines.take_expired(2e6)) == sorted(live)
