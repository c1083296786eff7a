"""Random lives of requests through both schedulers, against replicas that own real block managers.

The fake replicas know nothing of credit: they allocate when they are told to, and fail the test if a scheduler ever
sends more than fits. Whatever happened, at the end every request has ended and every block is free.
"""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.errors import InvalidRequest, Overloaded
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import Limits, PrefillScheduler
from ensemble.workers.messages import KVHandoff, PrefillBatch

BLOCK_SIZE = 4
BUDGET = 16
MAX_CHUNKS = 3
MAX_BATCHES = 2
DECODE_SEQS = 3
PREFILL_BLOCKS = 10
DECODE_BLOCKS = 12
FIRST_LOCAL = 2  # decode replicas that compute prompts are the prefill scheduler's replicas 2 and 3


class PrefillReplica:
    def __init__(self):
        self.blocks = BlockManager(PREFILL_BLOCKS, BLOCK_SIZE)
        self.prompts = {}  # request_id |-> (request, tokens computed)
        self.inbox = deque()  # in the order in which they were sent: batches, and ids of cancelled requests

    def run(self, batch):
        """Returns the prompts that the batch finished. Cancelled prompts are skipped."""
        finished = []
        for chunk in batch.chunks:
            if chunk.request is not None:
                assert chunk.start == 0 and chunk.request_id not in self.prompts
                self.blocks.allocate(
                    Owner("sequence", chunk.request_id), self.blocks.blocks_for(chunk.request.prompt_len)
                )
                self.prompts[chunk.request_id] = (chunk.request, 0)
            if chunk.request_id not in self.prompts:
                continue
            request, num_computed = self.prompts[chunk.request_id]
            assert chunk.start == num_computed and chunk.length > 0
            self.prompts[chunk.request_id] = (request, num_computed + chunk.length)
            if num_computed + chunk.length == request.prompt_len:
                finished.append(request)
        return finished


hints = st.builds(
    Hints,
    priority=st.integers(0, 2),
    tenant=st.sampled_from(["a", "b", "c"]),
    ttft_target_s=st.none() | st.floats(0.1, 10),
    num_cached_tokens=st.just(0),
)


class LifeOfRequests(RuleBasedStateMachine):
    policy = QueuePolicy()
    max_long_tokens = None
    local_limits = None  # of decode replicas that compute prompts too

    def __init__(self):
        super().__init__()
        self.prefill = PrefillScheduler(
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=BUDGET,
            max_num_seqs=MAX_CHUNKS,
            max_batches_in_flight=MAX_BATCHES,
            max_queue_requests=6,
            max_queue_tokens=150,
            policy=self.policy,
            max_long_tokens=self.max_long_tokens,
        )
        self.admission = DecodeAdmission(block_size=BLOCK_SIZE, max_num_bridge_seqs=2)
        self.prefill_replicas = {}
        self.decode_replicas = {}
        self.local_inboxes = {0: deque(), 1: deque()}  # of the decode replicas: batches
        self.local_prompts = {0: {}, 1: {}}  # request_id |-> (request, tokens computed)
        for replica in (0, 1):
            self.start_prefill(replica)
            self.start_decode(replica)
        self.now = 0.0
        self.num_requests = 0
        self.alive = set()
        self.num_transfers = 0
        self.leases = {}  # request_id |-> (prefill replica, transfer_id)
        self.last_started = -1
        self.bridge = deque()

    def start_prefill(self, replica):
        self.prefill_replicas[replica] = PrefillReplica()
        assert self.prefill.replica_up(replica, PREFILL_BLOCKS) == []

    def start_decode(self, replica):
        self.decode_replicas[replica] = BlockManager(DECODE_BLOCKS, BLOCK_SIZE)
        self.admission.replica_up(replica, DECODE_BLOCKS, DECODE_SEQS)
        if self.local_limits is not None:
            assert self.prefill.replica_up(FIRST_LOCAL + replica, DECODE_BLOCKS, self.local_limits) == []

    def end(self, request_id):
        self.alive.remove(request_id)

    def end_lease(self, request_id):
        replica, transfer_id = self.leases.pop(request_id)
        self.prefill_replicas[replica].blocks.free(Owner("transfer", transfer_id))
        self.prefill.released(replica, [request_id])

    # ---- what clients do

    @rule(prompt_len=st.integers(1, 45), max_tokens=st.integers(1, 12), wait_s=st.floats(0, 2), hints=hints)
    def arrive(self, prompt_len, max_tokens, wait_s, hints):
        self.now += wait_s
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(request_id=self.num_requests, prompt_token_ids=[1] * prompt_len, sampling=sampling)
        try:
            self.admission.check(request)
            self.prefill.add(request, self.now, hints)
        except InvalidRequest:
            needs_decode = max_tokens > 1
            decode_limit = DECODE_BLOCKS * BLOCK_SIZE
            assert prompt_len > self.prefill.max_prompt_len or (
                needs_decode and request.max_num_kv_tokens > decode_limit
            )
        except Overloaded as error:
            assert self.prefill.num_waiting == 6 or self.prefill.num_waiting_tokens + prompt_len > 150
            assert 0 < error.retry_after_s <= 60
        else:
            self.num_requests += 1
            self.alive.add(request.request_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.end(request_id)
        at_decode = self.admission.cancel(request_id)
        at_prefill = self.prefill.cancel(request_id)
        if at_decode is not None and at_decode[0] == "bridge":
            self.bridge.remove(request_id)
            self.end_lease(request_id)
        elif at_decode is not None and at_decode[0] == "decode":
            self.free_in_decode(at_decode[1], request_id)
        elif at_prefill == "queued":
            assert at_decode is None
        else:
            self.prefill_replicas[at_prefill].inbox.append(request_id)

    def free_prompt(self, replica, request_id):
        state = self.prefill_replicas[replica]
        if request_id in state.prompts:
            del state.prompts[request_id]
            state.blocks.free(Owner("sequence", request_id))
            self.prefill.released(replica, [request_id])

    # ---- what the system does

    @rule()
    def dispatch_prefill(self):
        batch = self.prefill.next_batch(self.now, self.may_start)
        if batch is None:
            return
        is_local = batch.replica >= FIRST_LOCAL
        if is_local:
            assert sum(chunk.length for chunk in batch.chunks) <= self.local_limits.max_num_batched_tokens
            self.send_local(batch.replica - FIRST_LOCAL, batch)
        assert 0 < sum(chunk.length for chunk in batch.chunks) <= BUDGET
        assert len(batch.chunks) <= MAX_CHUNKS
        started = [chunk.request_id for chunk in batch.chunks if chunk.request is not None]
        if self.policy.name == "fcfs" and self.max_long_tokens is None:
            assert started == sorted(started)
            if started:
                assert started[0] > self.last_started
                self.last_started = started[-1]
        assert all(chunk.request_id in self.alive for chunk in batch.chunks)
        if is_local:
            return
        inbox = self.prefill_replicas[batch.replica].inbox
        inbox.append(batch)
        assert sum(isinstance(message, PrefillBatch) for message in inbox) <= MAX_BATCHES

    def may_start(self, replica, request):
        if replica >= FIRST_LOCAL:
            return self.admission.try_start_at(replica - FIRST_LOCAL, request)
        return self.admission.try_promise(request)

    def send_local(self, replica, batch):
        self.local_inboxes[replica].append(batch)
        assert len(self.local_inboxes[replica]) <= self.local_limits.max_batches_in_flight
        blocks = self.decode_replicas[replica]
        for chunk in batch.chunks:
            if chunk.request is not None:
                assert chunk.request.prompt_len <= (self.local_limits.max_prompt_len or 1000)
                blocks.allocate(
                    Owner("sequence", chunk.request_id),
                    blocks.blocks_for(chunk.request.max_num_kv_tokens),
                )
                self.local_prompts[replica][chunk.request_id] = (chunk.request, 0)

    @precondition(lambda self: self.local_limits is not None)
    @rule(replica=st.sampled_from([0, 1]))
    def run_local(self, replica):
        if not self.local_inboxes[replica]:
            return
        batch, prompts = self.local_inboxes[replica].popleft(), self.local_prompts[replica]
        self.prefill.batch_done(FIRST_LOCAL + replica, batch.batch_id)
        for chunk in batch.chunks:
            if chunk.request_id not in prompts:
                continue
            request, num_computed = prompts[chunk.request_id]
            assert chunk.start == num_computed and chunk.length > 0
            prompts[chunk.request_id] = (request, num_computed + chunk.length)
            if num_computed + chunk.length == request.prompt_len:
                del prompts[chunk.request_id]
                if request.sampling.max_tokens == 1:
                    self.finish(replica, chunk.request_id)

    @rule(replica=st.sampled_from([0, 1]))
    def run_prefill(self, replica):
        state = self.prefill_replicas[replica]
        while state.inbox:
            message = state.inbox.popleft()
            if isinstance(message, int):
                self.free_prompt(replica, message)
                continue
            finished = state.run(message)
            self.prefill.batch_done(replica, message.batch_id)
            for request in finished:
                self.finish_prompt(replica, request)
            break

    def finish_prompt(self, replica, request):
        request_id = request.request_id
        if request_id not in self.alive or request.sampling.max_tokens == 1:
            if request_id in self.alive:
                self.end(request_id)
            self.admission.withdraw(request_id)
            self.free_prompt(replica, request_id)
            return
        state = self.prefill_replicas[replica]
        del state.prompts[request_id]
        transfer = Owner("transfer", self.num_transfers)
        self.num_transfers += 1
        state.blocks.reassign(Owner("sequence", request_id), transfer)
        self.leases[request_id] = (replica, transfer.id)
        self.bridge.append(request_id)
        self.admission.arrive(
            KVHandoff(
                transfer_id=transfer.id,
                source=str(replica),
                request=request,
                output_token_ids=[0],
                num_kv_tokens=request.prompt_len,
                block_ids=list(state.blocks.blocks_of(transfer)),
            )
        )

    @rule()
    def submit(self):
        submission = self.admission.next_submission()
        if submission is None:
            return
        assert submission.handoffs
        blocks = self.decode_replicas[submission.replica]
        for handoff in submission.handoffs:
            request = handoff.request
            assert request.request_id == self.bridge.popleft()
            blocks.allocate(Owner("sequence", request.request_id), blocks.blocks_for(request.max_num_kv_tokens))
            self.end_lease(request.request_id)

    @rule(data=st.data(), replica=st.sampled_from([0, 1]))
    def finish_decode(self, data, replica):
        decoding = self.decoding(replica)
        if decoding:
            self.finish(replica, data.draw(st.sampled_from(decoding)))

    def decoding(self, replica):
        prompts, blocks = self.local_prompts[replica], self.decode_replicas[replica]
        return [i for i in sorted(self.alive) if blocks.blocks_of(Owner("sequence", i)) and i not in prompts]

    def finish(self, replica, request_id):
        self.end(request_id)
        self.free_in_decode(replica, request_id)

    def free_in_decode(self, replica, request_id):
        self.local_prompts[replica].pop(request_id, None)
        self.decode_replicas[replica].free(Owner("sequence", request_id))
        self.admission.released(replica, [request_id])
        self.prefill.released(FIRST_LOCAL + replica, [request_id])

    # ---- what goes wrong

    @precondition(lambda self: self.num_requests % 5 == 4)  # seldom enough for lives to unfold
    @rule(stage=st.sampled_from(["prefill", "decode"]), replica=st.sampled_from([0, 1]))
    def lose(self, stage, replica):
        if stage == "prefill":
            self.lose_prefill(replica)
        else:
            self.lose_decode(replica)

    def lose_prefill(self, replica):
        for request_id in self.prefill.replica_down(replica):
            self.admission.cancel(request_id)
            self.leases.pop(request_id, None)
            if request_id in self.bridge:
                self.bridge.remove(request_id)
            self.alive.discard(request_id)
        self.start_prefill(replica)

    def lose_decode(self, replica):
        for request_id in self.admission.replica_down(replica):
            self.end(request_id)
        self.prefill.replica_down(FIRST_LOCAL + replica)
        self.local_inboxes[replica].clear()
        self.local_prompts[replica].clear()
        self.start_decode(replica)

    # ---- what always holds

    @invariant()
    def books_agree(self):
        self.prefill.check_integrity()
        self.admission.check_integrity()
        for state in self.prefill_replicas.values():
            state.blocks.check_integrity()
        for blocks in self.decode_replicas.values():
            blocks.check_integrity()
        assert self.admission.num_bridge_seqs == len(self.bridge)
        assert self.admission.num_free_blocks == sum(blocks.num_free_blocks for blocks in self.decode_replicas.values())

    def teardown(self):
        for _ in range(200):
            if not self.alive:
                break
            self.dispatch_prefill()
            for replica in (0, 1):
                self.run_prefill(replica)
                if self.local_limits is not None:
                    self.run_local(replica)
                for request_id in self.decoding(replica):
                    self.finish(replica, request_id)
            self.submit()
        assert not self.alive, "a request never ended"
        for replica in (0, 1):
            while self.prefill_replicas[replica].inbox:
                self.run_prefill(replica)
        self.books_agree()
        assert all(state.blocks.num_free_blocks == PREFILL_BLOCKS for state in self.prefill_replicas.values())
        assert self.admission.num_free_blocks == 2 * DECODE_BLOCKS
        assert self.admission.num_promised_seqs == 0 and self.prefill.num_waiting == 0


def check_lives(policy, max_long_tokens, local_limits):
    class Machine(LifeOfRequests):
        pass

    Machine.policy, Machine.max_long_tokens, Machine.local_limits = policy, max_long_tokens, local_limits
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=60, deadline=None, derandomize=True)
    )


@pytest.mark.parametrize("max_long_tokens", [None, 6])
@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "edf", "fair"])
def test_life_of_requests(name, max_long_tokens):
    check_lives(QueuePolicy(name, max_wait_s=5.0), max_long_tokens, local_limits=None)


@pytest.mark.parametrize("max_prompt_len", [None, 9])
@pytest.mark.parametrize("name", ["fcfs", "sjf", "fair"])
def test_life_where_decode_replicas_compute_prompts_too(name, max_prompt_len):
    check_lives(QueuePolicy(name, max_wait_s=5.0), None, Limits(8, 3, max_prompt_len, is_decoding=True))
