"""What a rank that hears of its leader's leases tells readers, in whatever order they come."""

import threading

from ensemble.transfer.leases import FollowedLeases

WAIT_S = 20.0


def test_a_reader_that_comes_before_the_grant_waits_for_it() -> None:
    leases, answers = FollowedLeases(WAIT_S), list[str | None]()
    reader = threading.Thread(target=lambda: answers.append(leases.why_not(7, [1, 2])), daemon=True)
    reader.start()
    leases.grant(8, [5])
    leases.grant(7, [1, 2, 3])
    reader.join(WAIT_S / 2)
    assert answers == [None]
    assert leases.why_not(7, [5]) == "block_ids = [5]: blocks of the lease of request 7 are wanted"


def test_one_that_comes_late_or_for_nothing_is_refused() -> None:
    leases = FollowedLeases(WAIT_S)
    leases.grant(7, [1])
    leases.end(7)
    assert leases.why_not(7, [1]) == "request_id = 7: one with a lease is wanted"
    leases.grant(7, [2])  # in another life of the replica
    assert leases.why_not(7, [2]) is None
    assert FollowedLeases(0.01).why_not(9, [1]) == "request_id = 9: one with a lease is wanted"
