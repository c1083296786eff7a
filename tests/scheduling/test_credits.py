import pytest

from ensemble.errors import InternalError
from ensemble.scheduling.credits import Credits


def test_credit_is_spent_and_comes_back():
    credits = Credits(num_blocks=10, max_num_seqs=2)
    credits.hold(1, 6)
    assert not credits.fits(5)
    credits.hold(2, 4)
    assert credits.free_blocks == 0 and credits.num_seqs == 2
    assert credits.release(1) == 6
    credits.check_integrity()
    assert credits.fits(6) and not credits.fits(7)


def test_places_run_out_before_blocks():
    credits = Credits(num_blocks=10, max_num_seqs=1)
    credits.hold(1, 1)
    assert not credits.fits(1)
    with pytest.raises(InternalError):
        credits.hold(2, 1)


def test_credit_is_held_once_and_released_once():
    credits = Credits(num_blocks=10)
    credits.hold(1, 1)
    with pytest.raises(InternalError):
        credits.hold(1, 1)
    credits.release(1)
    with pytest.raises(InternalError):
        credits.release(1)
    assert credits.free_blocks == 10
