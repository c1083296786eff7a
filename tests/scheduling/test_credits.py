import pytest

from ensemble.errors import InternalError
from ensemble.scheduling.credits import Credits


def test_credit_is_spent_and_comes_back():
    credits = Credits(10)
    credits.hold(1, 6)
    assert not credits.fits(5)
    credits.hold(2, 4)
    assert credits.free_blocks == 0 and credits.request_ids == [1, 2]
    assert (credits.held(1), credits.held(2), credits.held(3)) == (6, 4, 0)
    assert credits.release(1) == 6
    credits.check_integrity()
    assert credits.fits(6) and not credits.fits(7)
    assert 1 not in credits and credits.num_requests == 1


def test_what_does_not_fit_is_not_held():
    credits = Credits(10)
    with pytest.raises(InternalError):
        credits.hold(1, 11)
    assert credits.free_blocks == 10 and credits.num_requests == 0


def test_credit_is_held_once_and_comes_back_once():
    credits = Credits(10)
    credits.hold(1, 1)
    with pytest.raises(InternalError):
        credits.hold(1, 1)
    assert credits.release(1) == 1
    assert credits.release(1) == 0  # both schedulers hear of every release
    assert credits.free_blocks == 10
