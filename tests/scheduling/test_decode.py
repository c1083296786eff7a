import pytest

from ensemble.errors import InternalError
from ensemble.request import Sequence
from ensemble.scheduling.decode import DecodeScheduler


def test_the_batch_changes_at_every_iteration(make_request):
    scheduler = DecodeScheduler(max_num_seqs=2)
    sequences = [Sequence(make_request(request_id, 4)) for request_id in range(4)]
    for sequence in sequences[:3]:
        scheduler.add(sequence)
    assert scheduler.next_batch() == sequences[:2]
    assert scheduler.remove(0) is sequences[0]
    scheduler.add(sequences[3])
    assert scheduler.next_batch() == sequences[1:3]
    scheduler.remove(1)
    assert scheduler.next_batch() == sequences[2:]
    assert scheduler.remove(1) is None
    assert len(scheduler) == 2 and 2 in scheduler


def test_a_sequence_joins_once(make_request):
    scheduler = DecodeScheduler(max_num_seqs=2)
    scheduler.add(Sequence(make_request(1, 4)))
    with pytest.raises(InternalError):
        scheduler.add(Sequence(make_request(1, 4)))
