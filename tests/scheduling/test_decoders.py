"""Pools are filled by what sequences need at one time: no one waits for room that will be there."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import LOOK_EVERY_S, DecodeLimits, Decoders, Need, Progress, peak_tokens

POOL = 100


@given(st.lists(st.builds(Progress, st.integers(1, 50), st.integers(1, 30)), max_size=12))
def test_the_peak_is_the_most_that_is_held_when_all_go_on_token_by_token(sequences: list[Progress]) -> None:
    def held_after(num_steps: int) -> list[int]:
        return [each.num_tokens + num_steps for each in sequences if each.num_more_tokens >= num_steps]

    most, num_seqs = peak_tokens(sequences)
    assert most == max(sum(held_after(num_steps)) for num_steps in range(31))
    assert num_seqs in {len(held_after(num_steps)) for num_steps in range(31) if sum(held_after(num_steps)) == most}


def decoders(progress: dict[int, Progress], num_host_blocks: int = 0) -> Decoders:
    """One replica; blocks of one token. What is held is what is expected in the end."""
    decoders = Decoders(0.0, 1, progress.__getitem__)
    decoders.replica_up(0, Credits(POOL), DecodeLimits(64, num_host_blocks))
    for request_id, (num_tokens, num_more_tokens) in progress.items():
        length = num_tokens + num_more_tokens
        decoders.hold(0, request_id, Need(length, length))
    return decoders


def test_where_some_end_before_others_get_long_there_is_room_for_one_more() -> None:
    """40 and 2 more, 10 and 44 more: 96 in the end, but never more than 54 at one time."""
    known = {1: Progress(40, 2), 2: Progress(10, 44)}
    books = decoders(known)
    third = Need(30, 30)
    assert not books.fits(0, 3, third)
    books.look_again(0.0)
    assert books.fits(0, 3, third) and not books.fits(0, 3, Need(POOL - 54, POOL - 54))
    books.hold(0, 3, third)
    books.check_integrity()
    known[3] = Progress(20, 10)
    books.look_again(LOOK_EVERY_S)
    assert not books.fits(0, 4, third)
    for request_id in (2, 1, 3):
        books.released(0, [request_id])
        books.check_integrity()
    assert books.fits(0, 4, Need(POOL, POOL))


def test_who_has_ended_leaves_no_room_twice() -> None:
    books = decoders({1: Progress(40, 2), 2: Progress(10, 44)})
    books.look_again(0.0)
    books.released(0, [1])
    assert books.num_free_blocks == POOL - 54


def test_where_all_get_long_together_nobody_comes_on_top() -> None:
    books = decoders({1: Progress(10, 40), 2: Progress(8, 40)})
    before = books.num_free_blocks
    books.look_again(0.0)
    assert books.num_free_blocks == before


def test_where_a_host_pool_is_filled_it_takes_the_rest() -> None:
    books = decoders({1: Progress(40, 2), 2: Progress(10, 44)}, num_host_blocks=10)
    before = books.num_free_blocks
    books.look_again(0.0)
    assert books.num_free_blocks == before
