import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.request import Request, SamplingParams, Sequence
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy

QUANTUM_S = 0.01
STARVATION_S = 3.0


def make_policy(name):
    return make_decode_policy(DecodePolicySettings(name, quantum_s=QUANTUM_S, starvation_s=STARVATION_S))


def make_sequence(request_id, max_tokens=16):
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(Request(request_id=request_id, prompt_token_ids=[1], sampling=sampling), [5], 1)


class FastServeQueues:
    """notes of FastServe's code, literally: a batch is popped from the queues and pushed back after the iteration."""

    def __init__(self, skip_join):
        self.skip_join = skip_join
        self.queues = [[] for _ in range(40)]
        self.used = {}
        self.idle_since = {}

    def join(self, request_id, now, cost):
        level = next(p for p in range(40) if QUANTUM_S * 2**p >= cost) if self.skip_join else 0
        self.queues[level].append(request_id)
        self.used[request_id] = 0.0
        self.idle_since[request_id] = now

    def is_idle_since(self, request_id, now):
        """Of those that are so since the same moment, the one that was told first comes first."""
        del self.idle_since[request_id]
        self.idle_since[request_id] = now

    def leave(self, request_id):
        for queue in self.queues:
            if request_id in queue:
                queue.remove(request_id)
        del self.used[request_id], self.idle_since[request_id]

    def promote(self, now):
        starved = [i for i, since in self.idle_since.items() if now - since >= STARVATION_S]
        for request_id in sorted(starved, key=lambda i: self.idle_since[i]):
            self.is_idle_since(request_id, now)
            if request_id not in self.queues[0]:
                level = next(queue for queue in self.queues if request_id in queue)
                level.remove(request_id)
                self.queues[0].append(request_id)
                self.used[request_id] = 0.0

    def flat(self):
        return [request_id for queue in self.queues for request_id in queue]

    def iterate(self, batch, seconds, now):
        level_of = {i: level for level, queue in enumerate(self.queues) for i in queue}
        survivors = []
        for request_id in batch:
            self.is_idle_since(request_id, now)
            self.queues[level_of[request_id]].remove(request_id)
            self.used[request_id] += seconds
            if self.used[request_id] > QUANTUM_S * 2 ** level_of[request_id]:
                self.queues[level_of[request_id] + 1].append(request_id)
                self.used[request_id] = 0.0
            else:
                survivors.append(request_id)
        for request_id in reversed(survivors):
            self.queues[level_of[request_id]].insert(0, request_id)


@pytest.mark.parametrize("name", ["mlfq", "sj-mlfq"])
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["join", "iterate", "iterate", "iterate", "leave"]),
            st.integers(1, 4),
            st.sampled_from([0.001, 0.004, 0.01, 0.02, 0.5, 1.7]),
        ),
        max_size=80,
    )
)
@settings(max_examples=200, deadline=None)
def test_mlfq_follows_its_rules_exactly(name, operations):
    policy, queues, now = make_policy(name), FastServeQueues(name == "sj-mlfq"), 0.0
    for request_id, (operation, number, seconds) in enumerate(operations):
        if operation == "join":
            policy.add(make_sequence(request_id), now, priority=0, join_cost_s=seconds)
            queues.join(request_id, now, seconds)
        queues.promote(now)
        order = policy.order(now)
        assert order == queues.flat()
        if operation == "leave" and order:
            policy.remove(order[number % len(order)])
            queues.leave(order[number % len(order)])
        elif operation == "iterate":
            batch = order[: number + 1] if number < 4 else order[1:3]  # the first may be on the host
            now += seconds
            policy.ran(batch, seconds, now)
            queues.iterate(batch, seconds, now)


def test_skip_join_enters_where_the_quantum_covers_the_cost():
    policy = make_policy("sj-mlfq")
    for request_id, cost in reversed(list(enumerate([0.0, 0.01, 0.0101, 0.04, 0.3]))):
        policy.add(make_sequence(request_id), 0.0, priority=0, join_cost_s=cost)
    assert policy.order(0.0) == [1, 0, 2, 3, 4]  # the first two in one level, by joining; each of the others in a later


def test_srpt_runs_the_one_with_the_fewest_tokens_left():
    policy = make_policy("srpt")
    sequences = [make_sequence(request_id, max_tokens) for request_id, max_tokens in enumerate([9, 5, 7])]
    for sequence in sequences:
        policy.add(sequence, 0.0, priority=0, join_cost_s=0.0)
    assert policy.order(0.0) == [1, 2, 0]
    sequences[0].output_token_ids += [1] * 6
    policy.ran([0], 0.1, 0.1)
    assert policy.order(0.0) == [0, 1, 2]
    policy.remove(0)
    assert policy.order(0.0) == [1, 2]


def test_priority_runs_classes_in_order_and_each_by_joining():
    policy = make_policy("priority")
    for request_id, priority in enumerate([2, 0, 1, 0]):
        policy.add(make_sequence(request_id), 0.0, priority=priority, join_cost_s=0.0)
    assert policy.order(0.0) == [1, 3, 2, 0]


@pytest.mark.parametrize("name", ["srpt", "priority", "mlfq", "sj-mlfq"])
def test_the_last_in_line_runs_once_the_bound_has_passed(name):
    """A batch of one, and at any time somebody fresh whom the policy prefers to sequence 0."""
    policy = make_policy(name)
    policy.add(make_sequence(0, max_tokens=10_000), 0.0, priority=9, join_cost_s=1.0)
    policy.ran([0], 1.0, 0.0)  # it has used up its quantum, in the case of mlfq
    now, first_run_s, total_s = 0.0, None, 0.0
    fresh = 1
    policy.add(make_sequence(fresh), now, priority=0, join_cost_s=0.0)
    while now < 20.0:
        head = policy.order(now)[0]
        now += 0.005
        policy.ran([head], 0.005, now)
        if head == 0:
            first_run_s = now if first_run_s is None else first_run_s
            total_s += 0.005
        else:
            policy.remove(head)
            fresh += 1
            policy.add(make_sequence(fresh), now, priority=0, join_cost_s=0.0)
    assert first_run_s == pytest.approx(STARVATION_S, abs=0.02)
    assert total_s > 5 * QUANTUM_S  # and again and again, a quantum each time
    assert total_s < 1.0  # but no more than that


def test_first_come_first_served_never_reorders():
    policy = make_policy("fcfs")
    for request_id in (4, 2, 7):
        policy.add(make_sequence(request_id), 0.0, priority=request_id, join_cost_s=request_id)
    policy.ran([4], 1.0, 1.0)
    assert policy.order(100.0) == [4, 2, 7]
