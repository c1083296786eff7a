"""The queue under every policy against the policy's definition, evaluated naively over a list of all that wait."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.request import Request, SamplingParams
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.waiting_queue import WaitingQueue

MAX_WAIT_S = 20.0
AGING_S = 3.0
TARGET_S = 2.0
LONG = 30
POLICIES = ["fcfs", "sjf", "priority", "edf", "fair"]


def make_queue(name, **overrides):
    policy = QueuePolicy(name, max_wait_s=MAX_WAIT_S, aging_s=AGING_S, ttft_target_s=TARGET_S)
    return WaitingQueue(10_000, 10_000_000, policy, **overrides)


class Oracle:
    """`rank` restates each policy in one line; smaller starts earlier."""

    def __init__(self, name):
        self.name = name
        self.waiting = {}  # request_id |-> (request, hints, arrival_s)
        self.served = {}  # tenant |-> tokens

    def rank(self, request_id, now):
        request, hints, arrival_s = self.waiting[request_id]
        deadline = arrival_s + (TARGET_S if hints.ttft_target_s is None else hints.ttft_target_s)
        if now - arrival_s >= MAX_WAIT_S:
            return -1, 0, request_id
        if self.name == "fcfs":
            return 0, 0, request_id
        if self.name == "sjf":
            return 0, request.prompt_len - hints.num_cached_tokens, request_id
        if self.name == "priority":
            return 0, arrival_s + AGING_S * hints.priority, request_id
        if self.name == "edf":
            return (0, deadline, request_id) if deadline >= now else (1, arrival_s, request_id)
        return 0, self.served[hints.tenant], request_id

    def head(self, now, only_short):
        candidates = [i for i, (request, _, _) in self.waiting.items() if not only_short or request.prompt_len <= LONG]
        return min(candidates, key=lambda request_id: self.rank(request_id, now), default=None)


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "start", "start_short", "remove"]),
        st.floats(0, 6),
        st.integers(1, 60),
        st.builds(
            Hints,
            priority=st.integers(0, 3),
            tenant=st.sampled_from(["a", "b", "c"]),
            ttft_target_s=st.none() | st.sampled_from([0.5, 4.0, 12.0]),
            num_cached_tokens=st.sampled_from([0, 0, 1]),
        ),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "edf"])
@given(operations=operations, data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_head_is_the_one_the_definition_names(name, operations, data):
    queue, oracle, now = make_queue(name, long_prompt_len=LONG), Oracle(name), 0.0
    for request_id, (operation, wait_s, prompt_len, hints) in enumerate(operations):
        now += wait_s
        only_short = operation == "start_short"
        expected = oracle.head(now, only_short)
        head = queue.head(now, only_short)
        assert (None if head is None else head.request_id) == expected
        if operation == "add":
            request = Request(
                request_id=request_id, prompt_token_ids=[1] * prompt_len, sampling=SamplingParams(max_tokens=1)
            )
            queue.add(request, now, hints)
            oracle.waiting[request_id] = (request, hints, now)
        elif operation == "remove" and oracle.waiting:
            removed = data.draw(st.sampled_from(sorted(oracle.waiting)))
            queue.remove(removed)
            del oracle.waiting[removed]
        elif operation.startswith("start") and expected is not None:
            queue.start(expected, now)
            del oracle.waiting[expected]
        assert len(queue) == len(oracle.waiting)
        queue.check_integrity()


@given(
    tenants=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), min_size=40, max_size=200),
    outputs=st.lists(st.integers(0, 50), min_size=40, max_size=200),
)
@settings(max_examples=100, deadline=None)
def test_fair_serves_the_least_served_tenant(tenants, outputs):
    """Tenants that all have requests waiting never differ by more than the largest single charge."""
    queue = make_queue("fair")
    served = dict.fromkeys("abcd", 0)
    waiting = {}
    for request_id, (tenant, prompt_len) in enumerate(tenants):
        request = Request(request_id=request_id, prompt_token_ids=[1] * prompt_len, sampling=SamplingParams())
        queue.add(request, 0.0, Hints(tenant=tenant))
        waiting[request_id] = tenant
    ever_waiting = set(waiting.values())
    for num_output in outputs:
        if set(waiting.values()) != ever_waiting:
            break
        head = queue.head(0.0)
        tenant = waiting.pop(head.request_id)
        assert served[tenant] == min(served[each] for each in ever_waiting)
        assert head.request_id == min([head.request_id, *(i for i in waiting if waiting[i] == tenant)])
        queue.start(head.request_id, 0.0)
        queue.charge(tenant, num_output)
        served[tenant] += head.prompt_len + num_output
    spread = [served[tenant] for tenant in ever_waiting]
    assert max(spread) - min(spread) <= 100


def test_an_idle_tenant_saves_nothing_up(make_request):
    queue = make_queue("fair")
    for request_id in range(10):
        queue.add(make_request(request_id, 100), 0.0, Hints(tenant="busy"))
    for request_id in range(5):
        queue.start(request_id, 0.0)
    for request_id in range(10, 20):
        queue.add(make_request(request_id, 100), 0.0, Hints(tenant="new"))
    turns = []
    for _ in range(6):
        head = queue.head(0.0)
        turns.append("busy" if head.request_id < 10 else "new")
        queue.start(head.request_id, 0.0)
    assert turns.count("new") == 3  # half from now on, not all until it has caught up


def test_tenants_that_never_come_back_are_forgotten(make_request):
    queue = make_queue("fair")
    for request_id in range(5000):
        queue.add(make_request(request_id, 10), 0.0, Hints(tenant=f"tenant-{request_id}"))
        queue.start(request_id, 0.0)
    assert len(queue._ledger._served) < 1100


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_waits_past_the_starvation_bound_while_younger_ones_start(name, make_request):
    """The worst request of each policy against an endless stream of better ones, one start a second."""
    queue = make_queue(name)
    queue.add(make_request(0, 60), 0.0, Hints(priority=100, tenant="greedy", ttft_target_s=1e9))
    queue.add(make_request(-1, 1), 0.0, Hints(tenant="modest", ttft_target_s=30.0))
    queue.charge("greedy", 1_000_000)
    for second in range(100):
        queue.add(make_request(2 * second + 1, 1), second, Hints(tenant="modest", ttft_target_s=30.0))
        queue.add(make_request(2 * second + 2, 1), second, Hints(tenant="modest", ttft_target_s=30.0))
        head = queue.head(second)
        queue.start(head.request_id, second)
        if head.request_id == 0:
            break
    assert second == (0 if name == "fcfs" else MAX_WAIT_S)


def test_cancelled_requests_leave_no_trace_in_the_order(make_request):
    queue = make_queue("sjf")
    queue.add(make_request(0, 1), 0.0)
    for request_id in range(1, 2000):
        queue.add(make_request(request_id, 50), 0.0)
        queue.remove(request_id)
    assert len(queue._short._order._heap) < 50
    assert queue.head(0.0).request_id == 0
