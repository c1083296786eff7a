from itertools import pairwise

import pytest

from ensemble.engine.token_counts import candidates, worth_capturing


@pytest.mark.parametrize("max_num_tokens", [1, 16, 100, 1024, 2176])
def test_candidates_end_with_the_largest(max_num_tokens):
    counts = candidates(max_num_tokens)
    assert counts == sorted(set(counts)) and counts[-1] == max_num_tokens
    assert max_num_tokens < 100 or max(b - a for a, b in pairwise(counts)) <= 64


def test_a_step_pads_to_the_fastest_count_that_holds_it():
    """The staircase of LLaMA-2-13B's products, in milliseconds."""
    times = {256: 11.2, 264: 11.7, 288: 12.9, 320: 14.3, 512: 20.2, 520: 21.2, 528: 18.8, 544: 21.3, 640: 26.3}
    kept = worth_capturing(list(times), list(times.values()))
    assert kept == [256, 264, 288, 320, 528, 544, 640]
    for count, time in times.items():
        best = min(each for other, each in times.items() if other >= count)
        assert times[next(size for size in kept if size >= count)] <= best / 0.98
        assert time >= best


def test_where_more_rows_cost_nothing_one_graph_serves_all():
    assert worth_capturing([8, 16, 24], [5.0, 5.1, 5.0]) == [24]
