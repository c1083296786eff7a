"""No event is lost or told twice, whatever answers are lost."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble.serving.outbox import Outbox
from ensemble.workers.messages import Reserved


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
def test_every_event_arrives_once_and_in_order(rounds: list[tuple[int, bool]]) -> None:
    """Each round: so many events happen, then a poll is answered, and the answer arrives or does not."""
    outbox = Outbox(0)
    num_events, last_number = 0, 0
    arrived: list[int] = []

    def poll(is_lost: bool) -> None:
        nonlocal last_number
        outbox.confirm(last_number)
        answer = outbox.take()
        if not is_lost:
            last_number = answer.number
            arrived.extend(event.num_free_blocks for event in answer.events if isinstance(event, Reserved))

    for count, is_lost in rounds:
        for _ in range(count):
            outbox.add(Reserved(num_free_blocks=num_events))
            num_events += 1
        assert bool(outbox) or count == 0
        poll(is_lost)
    poll(is_lost=False)
    assert arrived == list(range(num_events))


def test_what_was_lost_is_not_kept_waiting() -> None:
    outbox = Outbox(0)
    outbox.add(Reserved(num_free_blocks=1))
    outbox.confirm(0)
    outbox.take()
    assert not outbox
    outbox.confirm(0)
    assert outbox, "the next poll is answered at once"
