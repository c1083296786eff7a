"""What the policies are for, on one seed of the simulation whose full run is docs/results/scheduling.json."""

from tools.benchmarks.simulate_scheduling import heavy_tailed_jobs, mixed_target_jobs, simulate_decode, simulate_prefill


def test_feedback_queues_beat_first_come_first_served_on_heavy_tails():
    jobs = heavy_tailed_jobs(seed=7, num_jobs=600, rate_per_s=10.5)
    fcfs, feedback = simulate_decode("fcfs", jobs), simulate_decode("sj-mlfq", jobs)
    assert feedback["mean completion time"] < fcfs["mean completion time"]
    assert feedback["P99 completion time per output token"] < fcfs["P99 completion time per output token"]


def test_earliest_deadline_first_attains_more_ttft_targets_at_load():
    jobs = mixed_target_jobs(seed=7, num_jobs=600, rate_per_s=18.0)
    assert simulate_prefill("edf", jobs) > simulate_prefill("fcfs", jobs)
