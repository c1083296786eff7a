"""Admission, preemption and swapping against a fake engine that really keeps KV: every slot holds (request, position).

A copy moves its data only when it ends, so a block that is reused or read too early shows as wrong KV. Where admission
is optimistic it expects no outputs at all, and still everything that was admitted ends.
"""

from collections import deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ensemble.cache.block_manager import BlockManager, Owner, SwappableBlocks
from ensemble.replicas.preemptive_decode import PreemptiveDecodeScheduler
from ensemble.request import Request, SamplingParams, Sequence
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decode_policies import DecodePolicySettings, make_decode_policy
from ensemble.scheduling.decoders import DecodeLimits, Decoders
from ensemble.scheduling.swapping import Footprint, IterationPlan, Memory, plan_iteration

BLOCK_SIZE = 2
NUM_BLOCKS = 10
MAX_NUM_SEQS = 3


class SwapStorm(RuleBasedStateMachine):
    policy = "mlfq"
    num_host_blocks = 30
    is_optimistic = False

    def __init__(self):
        super().__init__()
        self.blocks = SwappableBlocks(
            BlockManager(NUM_BLOCKS, BLOCK_SIZE), BlockManager(self.num_host_blocks, BLOCK_SIZE)
        )
        policy = make_decode_policy(DecodePolicySettings(self.policy, quantum_s=0.01, starvation_s=0.5))
        self.scheduler = PreemptiveDecodeScheduler(
            self.blocks, policy, max_num_seqs=MAX_NUM_SEQS, headroom_blocks=2, may_give_up=self.is_optimistic
        )
        self.device = [[None] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]
        self.host = [[None] * BLOCK_SIZE for _ in range(self.num_host_blocks)]
        self.sequences = {}
        self.hints = {}  # request_id |-> arguments for the policy
        self.copies = {}  # request_id |-> (swap, source pool, destination pool)
        self.num_requests = 0
        self.now = 0.0
        self.admission = DecodeAdmission(
            Decoders(),
            block_size=BLOCK_SIZE,
            max_bridge_wait_s=1.0,
            expected_kv_tokens=(lambda request: request.prefill_len) if self.is_optimistic else None,
        )
        self.num_given_up = 0
        self.admission.decoders.replica_up(0, Credits(NUM_BLOCKS), DecodeLimits(50, self.num_host_blocks))
        self.requests = {}  # request_id |-> waits in the bridge
        self.submitted = deque()  # admitted, waiting for blocks to be pulled into

    def write(self, sequence, position):
        block_id = sequence.block_ids[position // BLOCK_SIZE]
        self.device[block_id][position % BLOCK_SIZE] = (sequence.request_id, position)

    def check_kv(self, sequence):
        for position in range(sequence.num_computed_tokens):
            block_id = sequence.block_ids[position // BLOCK_SIZE]
            assert self.device[block_id][position % BLOCK_SIZE] == (sequence.request_id, position)

    @rule(
        prompt_len=st.integers(1, 6),
        max_tokens=st.integers(2, 14),
        priority=st.integers(0, 2),
        join_cost_s=st.sampled_from([0.0, 0.01, 0.05]),
    )
    def arrive(self, prompt_len, max_tokens, priority, join_cost_s):
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(request_id=self.num_requests, prompt_token_ids=[1] * prompt_len, sampling=sampling)
        self.admission.check(request)
        if not self.admission.may_start(request):
            return
        self.admission.promise(request)
        self.hints[self.num_requests] = {"priority": priority, "join_cost_s": join_cost_s}
        self.num_requests += 1
        self.requests[request.request_id] = request
        self.admission.arrive(request.request_id, source=1)

    def pull(self):
        """Returns the blocks that the first sequence which still waits needs."""
        while (submission := self.admission.next_submission()) is not None:
            self.submitted.extend(self.requests.pop(request_id) for request_id in submission.request_ids)
        while self.submitted:
            request = self.submitted[0]
            num_blocks = self.blocks.device.blocks_for(request.prefill_len)
            if not self.scheduler.has_room_for(num_blocks):
                return num_blocks
            self.submitted.popleft()
            sequence = Sequence(request, [1] * (len(request.resumed_token_ids) + 1), request.prefill_len)
            sequence.block_ids = self.blocks.device.allocate(Owner("sequence", request.request_id), num_blocks)
            for position in range(request.prefill_len):
                self.write(sequence, position)
            self.sequences[request.request_id] = sequence
            self.scheduler.add(sequence, self.now, **self.hints[request.request_id])
        return 0

    @rule(
        seconds=st.sampled_from([0.002, 0.02, 0.3]),
        makes_room=st.booleans(),
        num_iterations=st.integers(1, 5),
    )
    def iterate(self, seconds, makes_room, num_iterations):
        for _ in range(num_iterations):
            self.run_iteration(seconds, makes_room)

    def run_iteration(self, seconds, makes_room):
        num_wanted_blocks = self.pull()
        plan = self.scheduler.next_plan(self.now, num_wanted_blocks if makes_room else 0)
        moving = [swap.request_id for swap in plan.swap_out + plan.swap_in]
        assert len(plan.run) <= MAX_NUM_SEQS
        assert not (plan.swap_out and plan.swap_in)
        assert len({*moving, *(sequence.request_id for sequence in plan.run), *self.copies}) == (
            len(moving) + len(plan.run) + len(self.copies)
        )
        for swap in plan.swap_out:
            self.copies[swap.request_id] = swap, self.device, self.host
        for swap in plan.swap_in:
            self.copies[swap.request_id] = swap, self.host, self.device
        self.now += seconds
        for sequence in plan.run:
            self.check_kv(sequence)
            self.write(sequence, sequence.num_tokens - 1)
            sequence.num_computed_tokens += 1
            sequence.append(1, frozenset())
        self.scheduler.ran(seconds, self.now)
        assert self.is_optimistic or not plan.give_up
        for sequence in plan.give_up:
            self.compute_again(sequence)
        for sequence in plan.run:
            if sequence.is_finished:
                assert self.scheduler.remove(sequence.request_id)
                self.leave(sequence.request_id)
        return plan

    def compute_again(self, sequence):
        """It goes on from its tokens, one of which is computed with its prompt, as a request of another id."""
        assert self.scheduler.remove(sequence.request_id)
        self.leave(sequence.request_id)
        self.num_given_up += 1
        if sequence.num_left_tokens > 1:
            request_id, self.num_requests = self.num_requests, self.num_requests + 1
            again = msgspec.structs.replace(
                sequence.request, request_id=request_id, resumed_token_ids=list(sequence.output_token_ids)
            )
            self.hints[request_id] = self.hints[sequence.request_id]
            self.requests[request_id] = again
            self.admission.promise(again)
            self.admission.arrive(request_id, source=1)

    def leave(self, request_id):
        del self.sequences[request_id]
        if request_id not in self.copies:
            self.admission.decoders.released(0, [request_id])

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def end_copy(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.copies))))

    def end(self, request_id):
        swap, source, destination = self.copies.pop(request_id)
        for source_id, destination_id in zip(swap.source_block_ids, swap.destination_block_ids, strict=True):
            destination[destination_id][:] = source[source_id]
        assert self.scheduler.swap_ended(request_id) == (request_id not in self.sequences)
        if request_id not in self.sequences:
            self.admission.decoders.released(0, [request_id])

    @precondition(lambda self: self.num_requests % 3 == 2 and self.sequences)  # seldom enough for pressure to build up
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.sequences)))
        assert self.scheduler.remove(request_id) == (request_id not in self.copies)
        self.leave(request_id)

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity()
        self.admission.check_integrity()
        assert len(self.scheduler) == len(self.sequences)

    def teardown(self):
        """Everything ends, at most one idle pass between two that do something."""
        num_idle = 0
        while self.sequences or self.copies or self.submitted or self.admission.num_bridge_seqs:
            for request_id in sorted(self.copies):
                self.end(request_id)
            plan = self.run_iteration(0.02, makes_room=False)
            num_idle = 0 if plan.run or plan.swap_in or plan.swap_out or plan.give_up else num_idle + 1
            assert num_idle < 2, "nothing can move any more"
            self.books_agree()
        assert self.blocks.device.num_free_blocks == NUM_BLOCKS
        assert self.blocks.host.num_free_blocks == self.num_host_blocks


@pytest.mark.parametrize(("num_host_blocks", "is_optimistic"), [(8, False), (30, False), (0, True), (8, True)], ids=str)
@pytest.mark.parametrize("name", ["fcfs", "srpt", "priority", "mlfq", "sj-mlfq"])
def test_swap_storm(name, num_host_blocks, is_optimistic):
    changes = {"policy": name, "num_host_blocks": num_host_blocks, "is_optimistic": is_optimistic}
    machine = type("Machine", (SwapStorm,), changes)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=20, stateful_step_count=50, deadline=None, derandomize=True)
    )


def on_device(request_id, num_blocks, growth=0):
    return Footprint(request_id, "device", num_blocks, growth)


def on_host(request_id, num_blocks):
    return Footprint(request_id, "host", num_blocks, 0)


def test_room_for_the_one_due_next_is_made_ahead_of_need():
    """Sequence 9 came to the front while it is on the host: the last in line makes room, the others run on."""
    order = [on_host(9, 6), on_device(1, 10), on_device(2, 10), on_device(3, 10)]
    memory = Memory(num_blocks=32, num_free_blocks=2, num_returning_blocks=0, num_free_host_blocks=50)
    plan = plan_iteration(order, memory, max_num_seqs=4, headroom=4)
    assert (plan.run, plan.swap_out, plan.swap_in) == ([1, 2], [3], [])
    copying = [on_host(9, 6), on_device(1, 10), on_device(2, 10), Footprint(3, "out", 10, 0)]
    memory = Memory(num_blocks=32, num_free_blocks=2, num_returning_blocks=10, num_free_host_blocks=40)
    plan = plan_iteration(copying, memory, max_num_seqs=4, headroom=4)
    assert (plan.run, plan.swap_out, plan.swap_in) == ([1, 2], [], [])
    swapped = [on_host(9, 6), on_device(1, 10), on_device(2, 10), on_host(3, 10)]
    memory = Memory(num_blocks=32, num_free_blocks=12, num_returning_blocks=0, num_free_host_blocks=40)
    plan = plan_iteration(swapped, memory, max_num_seqs=4, headroom=4)
    assert (plan.run, plan.swap_out, plan.swap_in) == ([1, 2], [], [9])


def test_headroom_is_kept_at_the_cost_of_those_not_due():
    order = [on_device(1, 15), on_device(2, 14), on_device(3, 2)]
    memory = Memory(num_blocks=32, num_free_blocks=1, num_returning_blocks=0, num_free_host_blocks=50)
    assert plan_iteration(order, memory, max_num_seqs=2, headroom=2).swap_out == [3]
    assert plan_iteration(order[:2], memory, max_num_seqs=2, headroom=2).swap_out == []


def test_a_batch_that_has_outgrown_the_pool_loses_its_last_member():
    order = [on_device(1, 4, growth=1), on_device(2, 4), on_device(3, 4)]
    memory = Memory(num_blocks=12, num_free_blocks=0, num_returning_blocks=0, num_free_host_blocks=50)
    plan = plan_iteration(order, memory, max_num_seqs=3, headroom=0)
    assert (plan.run, plan.swap_out) == ([2], [3])


def test_a_full_host_pool_stops_nothing_but_swapping():
    order = [on_device(1, 5, growth=1), on_device(2, 5), on_device(3, 6)]
    memory = Memory(num_blocks=16, num_free_blocks=0, num_returning_blocks=0, num_free_host_blocks=3)
    plan = plan_iteration(order, memory, max_num_seqs=3, headroom=2)
    assert (plan.run, plan.swap_out, plan.swap_in) == ([2, 3], [], [])


def test_sequences_return_in_order_and_not_for_a_moment_only():
    memory = Memory(num_blocks=80, num_free_blocks=30, num_returning_blocks=0, num_free_host_blocks=50)
    order = [on_device(1, 10), on_host(2, 24), on_host(3, 1)]
    assert plan_iteration(order, memory, max_num_seqs=2, headroom=10).swap_in == []  # 3 may not overtake 2
    order = [on_device(1, 10), on_host(2, 12), on_host(3, 1)]
    assert plan_iteration(order, memory, max_num_seqs=2, headroom=10).swap_in == [2]  # 3 is not due: twice the headroom


def test_the_headroom_is_used_rather_than_that_nothing_runs():
    waiting = on_host(1, 14)
    memory = Memory(num_blocks=16, num_free_blocks=1, num_returning_blocks=0, num_free_host_blocks=0)
    plan = plan_iteration([waiting, on_device(2, 15, growth=1)], memory, max_num_seqs=2, headroom=2)
    assert plan.run == [2]  # the host pool is full: it runs on, until it ends and makes room
    memory = Memory(num_blocks=16, num_free_blocks=16, num_returning_blocks=0, num_free_host_blocks=0)
    assert plan_iteration([on_host(1, 16)], memory, max_num_seqs=2, headroom=2).swap_in == [1]


def test_the_last_is_given_up_for_the_first_where_nothing_can_be_swapped():
    order = [on_device(0, 4, growth=1), on_device(1, 3), on_device(2, 3)]
    full = Memory(num_blocks=10, num_free_blocks=0, num_returning_blocks=0, num_free_host_blocks=0)
    assert plan_iteration(order, full, 3, 0, may_give_up=True) == IterationPlan(run=[1], give_up=[2])
    assert plan_iteration(order, full, 3, 0).give_up == []
    returning = Memory(num_blocks=10, num_free_blocks=0, num_returning_blocks=1, num_free_host_blocks=0)
    assert plan_iteration(order, returning, 3, 0, may_give_up=True).give_up == []
    room_in_host = Memory(num_blocks=10, num_free_blocks=0, num_returning_blocks=0, num_free_host_blocks=3)
    assert plan_iteration(order, room_in_host, 3, 0, may_give_up=True) == IterationPlan(run=[1], swap_out=[2])


def test_the_last_is_given_up_so_that_the_first_comes_back_from_a_full_host_pool():
    order = [Footprint(0, "host", 4, 0), on_device(1, 5, growth=1), on_device(2, 5)]
    full = Memory(num_blocks=10, num_free_blocks=0, num_returning_blocks=0, num_free_host_blocks=0)
    plan = plan_iteration(order, full, 3, 0, may_give_up=True)
    assert plan.give_up == [2] and plan.run == [] and plan.swap_in == []
