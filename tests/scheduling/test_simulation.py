"""What the policies are for, on one seed of the simulation whose full run is docs/results/scheduling.json."""

from tools.benchmarks.simulate_scheduling import attained, decode_figures, heavy_tailed, mixed_targets


def test_feedback_queues_beat_first_come_first_served_on_heavy_tails() -> None:
    asks = heavy_tailed(seed=7, number=300, rate=10.5)
    fcfs, feedback = decode_figures("fcfs", asks), decode_figures("sj-mlfq", asks)
    assert feedback["mean completion time"] < fcfs["mean completion time"]
    assert feedback["P99 completion time per output token"] < fcfs["P99 completion time per output token"]


def test_earliest_deadline_first_attains_more_ttft_targets_at_load() -> None:
    asks = mixed_targets(seed=7, number=300, rate=18.0)
    assert attained("edf", asks) > attained("fcfs", asks)
