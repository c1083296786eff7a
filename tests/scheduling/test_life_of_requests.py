"""Random lives of requests through both schedulers, against replicas that own real block managers.

The fake replicas know nothing of credit: they allocate when they are told to, and fail the test if a scheduler ever
sends more than fits. Whatever happened, at the end every request has ended and every block is free.
"""

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.errors import InvalidRequest, Overloaded
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.admission import DecodeAdmission
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.decoders import DecodeLimits, Decoders
from ensemble.scheduling.policies import Hints, QueuePolicy
from ensemble.scheduling.prefill import PrefillScheduler
from ensemble.scheduling.prefiller import Limits

BLOCK_SIZE = 4
BUDGET = 16
MAX_CHUNKS = 3
MAX_BATCHES = 2
DECODE_SEQS = 3
ROLES = {0: "prefill", 1: "prefill", 2: "decode", 3: "decode"}
NUM_BLOCKS = {0: 10, 1: 10, 2: 12, 3: 12}
MAX_LIFE_TOKENS = NUM_BLOCKS[2] * BLOCK_SIZE  # of what decodes
UNEVEN_NUM_BLOCKS = {0: 5, 1: 11, 2: 12, 3: 12}  # most prompts fit one of those that only prefill
MIXED_LIMITS = Limits(8, 3, stays=True)


@dataclass
class Batch:
    batch_id: int
    chunks: list


@dataclass
class Join:
    request: Request
    num_outputs: int
    source: "Replica"


@dataclass
class Cancel:
    request_id: int


@dataclass
class Prompt:
    request: Request
    stays: bool
    num_computed: int = 0


class Replica:
    """One life of a replica."""

    def __init__(self, id, num_blocks):
        self.id = id
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.credits = Credits(num_blocks)
        self.is_up = True
        self.inbox = deque()  # in the order in which they were sent
        self.prompts = {}  # request_id |-> Prompt
        self.leases = set()  # request ids
        self.decoding = {}  # request_id |-> [request, number of outputs]

    @property
    def num_batches(self):
        return sum(isinstance(message, Batch) for message in self.inbox)

    @property
    def sequences(self):
        return {*self.decoding, *(request_id for request_id, prompt in self.prompts.items() if prompt.stays)}

    def free(self, request_id):
        """True if there was something of it here."""
        if request_id in self.leases:
            self.leases.remove(request_id)
            self.blocks.free(Owner("transfer", request_id))
            return True
        if self.prompts.pop(request_id, None) is None and self.decoding.pop(request_id, None) is None:
            return False
        self.blocks.free(Owner("sequence", request_id))
        return True


@dataclass
class Life:
    """What the router knows of a live request."""

    request: Request  # of the present attempt
    num_outputs: int
    prefill_replica: int | None = None
    decode_replica: int | None = None
    num_deaths: int = 0
    is_alone: bool = False


hints = st.builds(
    Hints,
    priority=st.integers(0, 2),
    tenant=st.sampled_from(["a", "b", "c"]),
    ttft_target_s=st.none() | st.floats(0.1, 10),
    num_cached_tokens=st.just(0),
)
replicas = st.sampled_from(sorted(ROLES))


class LifeOfRequests(RuleBasedStateMachine):
    policy = QueuePolicy()
    max_long_tokens = None
    local_limits = None  # of decode replicas that compute prompts too
    changes_roles = False
    num_blocks = NUM_BLOCKS

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
        self.admission = DecodeAdmission(
            Decoders(),
            block_size=BLOCK_SIZE,
            max_bridge_wait_s=1.0,
            wait_s=lambda num_blocks: float(self.admission.num_promised_seqs),
        )
        self.roles = dict(ROLES)
        self.replicas = {}
        for replica_id in ROLES:
            self.start(replica_id)
        self.now = 0.0
        self.num_attempts = 0
        self.alive = {}  # id of the attempt |-> Life
        self.bridge = []
        self.again = []  # attempts that wait to be computed again, in order
        self.last_started = -1

    @property
    def is_plain(self):
        """All replicas of a stage are alike and reachable: nothing is ever held back, so order can be asserted."""
        return self.local_limits is None and not self.changes_roles and self.num_blocks == NUM_BLOCKS

    def limits(self, replica_id):
        role = self.roles[replica_id]
        return {"prefill": self.prefill.limits, "decode": self.local_limits, "mixed": MIXED_LIMITS}[role]

    def start(self, replica_id):
        replica = self.replicas[replica_id] = Replica(replica_id, self.num_blocks[replica_id])
        is_open = self.roles[replica_id] != "prefill"
        self.admission.decoders.replica_up(replica_id, replica.credits, DecodeLimits(DECODE_SEQS), is_open=is_open)
        self.refuse(self.prefill.replica_up(replica_id, replica.credits, self.limits(replica_id)))

    def refuse(self, request_ids):
        for request_id in request_ids:
            assert self.alive[request_id].request.prefill_len > self.prefill.max_prompt_len
            self.end(request_id)

    def up_ones(self):
        return [replica for replica in self.replicas.values() if replica.is_up]

    def end(self, request_id):
        """Nothing that a replica says concerns it any more."""
        self.admission.withdraw(request_id)
        if request_id in self.again:
            self.again.remove(request_id)
        return self.alive.pop(request_id)

    def give_up(self, request_id):
        """Ends an attempt wherever it is."""
        num_waiting, num_promised = self.prefill.num_waiting, self.admission.num_promised_seqs
        self.admission.withdraw(request_id)
        self.prefill.cancel(request_id)
        assert num_waiting == self.prefill.num_waiting or num_promised == self.admission.num_promised_seqs
        if request_id in self.bridge:
            self.bridge.remove(request_id)
        self.release_everywhere(request_id)
        return self.end(request_id)

    def release_everywhere(self, request_id):
        for replica in self.up_ones():
            if request_id in replica.credits:
                replica.inbox.append(Cancel(request_id))

    def released(self, replica, request_id):
        self.prefill.released(replica.id, [request_id])
        self.admission.decoders.released(replica.id, [request_id])

    # ---- what clients do

    @rule(
        lengths=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 12)), min_size=1, max_size=4),
        wait_s=st.floats(0, 2),
        hints=hints,
    )
    def arrive(self, lengths, wait_s, hints):
        self.now += wait_s
        for prompt_len, max_tokens in lengths:
            self.add(prompt_len, max_tokens, hints)

    def add(self, prompt_len, max_tokens, hints):
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(request_id=self.num_attempts, prompt_token_ids=[1] * prompt_len, sampling=sampling)
        if self.changes_roles and max_tokens > 1 and request.max_num_kv_tokens > MAX_LIFE_TOKENS:
            return  # known to be too long only while some replica takes sequences
        try:
            self.admission.check(request)
            self.prefill.add(request, self.now, hints)
        except InvalidRequest:
            is_too_long_for_decode = max_tokens > 1 and request.max_num_kv_tokens > MAX_LIFE_TOKENS
            assert self.changes_roles or is_too_long_for_decode or prompt_len > self.prefill.max_prompt_len
        except Overloaded as error:
            assert self.prefill.num_waiting >= 6 or self.prefill.num_waiting_tokens + prompt_len > 150
            assert 0 < error.retry_after_s <= 60
        else:
            self.num_attempts += 1
            self.alive[request.request_id] = Life(request, num_outputs=0)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        self.give_up(data.draw(st.sampled_from(sorted(self.alive))))

    @rule(order=st.permutations(sorted(ROLES)), num_rounds=st.integers(1, 4), decodes=st.booleans())
    def run(self, order, num_rounds, decodes):
        """Everybody does something, in some order."""
        for replica_id in order * num_rounds:
            self.submit()
            self.dispatch_prefill()
            self.take_message(replica_id)
            self.decode(replica_id, int(decodes))

    # ---- what the router does

    @rule()
    def dispatch_prefill(self):
        batch = self.prefill.next_batch(self.now, self.may_start)
        if batch is None:
            return
        replica, limits = self.replicas[batch.replica], self.limits(batch.replica) or self.prefill.limits
        assert replica.is_up
        assert 0 < batch.num_tokens <= limits.max_num_batched_tokens
        assert len(batch.chunks) <= MAX_CHUNKS
        started = []
        for chunk in batch.chunks:
            life = self.alive[chunk.request_id]
            if chunk.is_first:
                assert chunk.start == 0 and chunk.request.prefill_len <= (limits.max_prompt_len or 1000)
                started.append(chunk.request_id)
                if life.decode_replica is None:
                    life.prefill_replica = replica.id
        self.check_order(started)
        replica.inbox.append(
            Batch(
                batch.batch_id,
                [(each, self.alive[each.request_id].decode_replica is not None) for each in batch.chunks],
            )
        )
        assert replica.num_batches <= limits.max_batches_in_flight
        assert len(self.prefill.unfinished(replica.id)) >= len(batch.chunks)

    def check_order(self, started):
        again = [request_id for request_id in started if request_id in self.again]
        first_timers = [request_id for request_id in started if request_id not in self.again]
        if self.is_plain and self.max_long_tokens is None:
            assert started[: len(again)] == again == self.again[: len(again)]  # they go first, in order
            assert not first_timers or len(again) == len(self.again)
            if self.policy.name == "fcfs":
                assert first_timers == sorted(first_timers)
                assert not first_timers or first_timers[0] > self.last_started
                self.last_started = first_timers[-1] if first_timers else self.last_started
        self.again = [request_id for request_id in self.again if request_id not in again]

    def may_start(self, replica_id, request):
        if self.roles[replica_id] == "prefill":
            if may_start := self.admission.may_start(request):
                self.admission.promise(request)
            return may_start
        if not self.admission.try_start_at(replica_id, request):
            return False
        self.alive[request.request_id].decode_replica = replica_id
        return True

    @rule()
    def submit(self):
        submission = self.admission.next_submission()
        if submission is None:
            return
        assert submission.request_ids
        if self.is_plain:
            assert submission.request_ids == self.bridge[: len(submission.request_ids)]
        reader = self.replicas[submission.replica]
        assert reader.is_up and self.roles[reader.id] != "prefill"
        for request_id in submission.request_ids:
            self.bridge.remove(request_id)
            life = self.alive[request_id]
            assert (life.prefill_replica, reader.id) not in self.admission.decoders.unreachable
            life.decode_replica = reader.id
            reader.inbox.append(Join(life.request, life.num_outputs, self.replicas[life.prefill_replica]))

    # ---- what replicas do

    @rule(replica_id=replicas)
    def take_message(self, replica_id):
        replica = self.replicas[replica_id]
        if not replica.inbox:
            return
        message = replica.inbox.popleft()
        if isinstance(message, Cancel):
            if replica.free(message.request_id):
                self.released(replica, message.request_id)
        elif isinstance(message, Join):
            self.join(replica, message)
        else:
            self.prefill.batch_done(replica.id, message.batch_id)
            for chunk, stays in message.chunks:
                self.compute(replica, chunk, stays)

    def compute(self, replica, chunk, stays):
        request_id = chunk.request_id
        if chunk.is_first:
            num_tokens = chunk.request.max_num_kv_tokens if stays else chunk.request.prefill_len
            replica.blocks.allocate(Owner("sequence", request_id), replica.blocks.blocks_for(num_tokens))
            replica.prompts[request_id] = Prompt(chunk.request, stays)
        prompt = replica.prompts.get(request_id)
        if prompt is None:
            return  # cancelled
        assert chunk.start == prompt.num_computed and chunk.length > 0
        prompt.num_computed = chunk.end
        if prompt.num_computed == prompt.request.prefill_len:
            self.finish_prompt(replica, prompt)

    def finish_prompt(self, replica, prompt):
        request_id = prompt.request.request_id
        replica.prompts.pop(request_id)
        if prompt.stays:
            replica.decoding[request_id] = [prompt.request, len(prompt.request.resumed_token_ids)]
            self.sample(replica, request_id)
            return
        owner, transfer = Owner("sequence", request_id), Owner("transfer", request_id)
        life = self.alive.get(request_id)
        if life is not None:
            life.num_outputs += 1
        if len(prompt.request.resumed_token_ids) + 1 == prompt.request.sampling.max_tokens:
            replica.blocks.free(owner)
            if life is not None:
                self.end(request_id)
            self.released(replica, request_id)
            return
        replica.blocks.reassign(owner, transfer)
        replica.leases.add(request_id)
        if life is not None:  # else its cancel is on the way
            self.bridge.append(request_id)
            self.admission.arrive(request_id, replica.id)
            self.fail_unreachable(replica)

    def join(self, replica, message):
        request = message.request
        owner, num_blocks = Owner("sequence", request.request_id), replica.blocks.blocks_for(request.max_num_kv_tokens)
        if message.source is replica:
            if request.request_id not in replica.leases:
                return  # cancelled
            replica.leases.remove(request.request_id)
            replica.blocks.reassign(Owner("transfer", request.request_id), owner)
            replica.blocks.extend(owner, num_blocks - len(replica.blocks.blocks_of(owner)))
        else:
            replica.blocks.allocate(owner, num_blocks)
            if message.source.is_up and message.source.free(request.request_id):
                self.released(message.source, request.request_id)
        replica.decoding[request.request_id] = [request, message.num_outputs]
        if request.request_id in self.alive:
            self.alive[request.request_id].prefill_replica = None

    @rule(replica_id=replicas, num_steps=st.integers(1, 4))
    def decode(self, replica_id, num_steps):
        replica = self.replicas[replica_id]
        for _ in range(num_steps):
            for request_id in list(replica.decoding):
                self.sample(replica, request_id)

    def sample(self, replica, request_id):
        request, num_outputs = replica.decoding[request_id]
        replica.decoding[request_id][1] = num_outputs = num_outputs + 1
        life = self.alive.get(request_id)
        if life is not None:
            assert num_outputs == life.num_outputs + 1
            life.num_outputs = num_outputs
            if life.is_alone and num_outputs >= len(request.resumed_token_ids) + 3:
                life.is_alone, life.num_deaths = False, 0
                self.admission.decoders.clear_alone(request_id)
        if num_outputs == request.sampling.max_tokens:
            replica.free(request_id)
            if life is not None:
                self.end(request_id)
            self.released(replica, request_id)

    # ---- what goes wrong, and what the operator does

    @rule(replica_id=replicas, comes_back=st.booleans())
    def lose(self, replica_id, comes_back):
        replica = self.replicas[replica_id]
        if replica.is_up:
            replica.is_up = False
            replica.inbox.clear()
            replica.decoding.clear()
            held = replica.credits.request_ids
            self.prefill.replica_down(replica_id)
            self.admission.decoders.replica_down(replica_id)
            for request_id in held:
                life = self.alive.get(request_id)
                if life is None:
                    self.release_everywhere(request_id)
                elif replica_id in (life.prefill_replica, life.decode_replica):
                    life.num_deaths += 1
                    self.recover(request_id)
            self.fail_unreachable_everywhere()
        if comes_back:
            self.come_back(replica_id)

    @rule(replica_id=replicas)
    def come_back(self, replica_id):
        if not self.replicas[replica_id].is_up:
            self.start(replica_id)

    def recover(self, request_id):
        life = self.give_up(request_id)
        request = Request(
            request_id=self.num_attempts,
            prompt_token_ids=life.request.prompt_token_ids,
            sampling=life.request.sampling,
            resumed_token_ids=[1] * life.num_outputs,
        )
        self.num_attempts += 1
        try:
            self.admission.check(request)
        except InvalidRequest:
            assert self.changes_roles
            return
        self.prefill.add(request, self.now, is_again=True)
        if self.prefill.max_prompt_len is not None and request.prefill_len > self.prefill.max_prompt_len:
            num_waiting = self.prefill.num_waiting
            self.prefill.cancel(request.request_id)
            assert self.prefill.num_waiting == num_waiting - 1
            return
        again = Life(request, life.num_outputs, num_deaths=life.num_deaths, is_alone=life.num_deaths >= 2)
        self.alive[request.request_id] = again
        self.again.append(request.request_id)
        if again.is_alone:
            self.admission.decoders.set_alone(request.request_id)

    @precondition(lambda self: self.changes_roles)
    @rule(replica_id=replicas, role=st.sampled_from(["prefill", "decode", "mixed"]))
    def change_role(self, replica_id, role):
        self.roles[replica_id] = role
        if self.replicas[replica_id].is_up:
            self.admission.decoders.set_open(replica_id, role != "prefill")
            self.refuse(self.prefill.set_limits(replica_id, self.limits(replica_id)))
        self.fail_unreachable_everywhere()

    @precondition(lambda self: self.changes_roles)
    @rule(source_id=st.sampled_from([0, 1]), reader_id=st.sampled_from([2, 3]))
    def lose_reach(self, source_id, reader_id):
        source, reader = self.replicas[source_id], self.replicas[reader_id]
        if not (source.is_up and reader.is_up):
            return
        self.admission.decoders.cannot_reach(source_id, reader_id)
        for message in list(reader.inbox):
            if isinstance(message, Join) and message.source is source:
                reader.inbox.remove(message)
                self.released(reader, message.request.request_id)
                if source.free(message.request.request_id):
                    self.released(source, message.request.request_id)
                if message.request.request_id in self.alive:
                    self.recover(message.request.request_id)
        self.fail_unreachable(source)

    def fail_unreachable_everywhere(self):
        """The last reader that could map a pool takes no sequences any more."""
        for replica in self.up_ones():
            self.fail_unreachable(replica)

    def fail_unreachable(self, source):
        if not self.admission.decoders.is_reachable_from(source.id):
            for request_id in list(self.bridge):
                if self.alive[request_id].prefill_replica == source.id:
                    self.give_up(request_id)

    # ---- what always holds

    @invariant()
    def books_agree(self):
        self.prefill.check_integrity()
        self.admission.check_integrity()
        assert self.admission.num_bridge_seqs == len(self.bridge)
        for replica in self.up_ones():
            replica.blocks.check_integrity()
            if not replica.inbox and not set(self.prefill.unfinished(replica.id)) - set(replica.prompts):
                assert replica.credits.free_blocks == replica.blocks.num_free_blocks
            sequences = [request_id for request_id in replica.sequences if request_id in self.alive]
            assert len(sequences) == 1 or not any(self.alive[request_id].is_alone for request_id in sequences)

    def teardown(self):
        for replica_id in ROLES:
            self.come_back(replica_id)
            if self.changes_roles:
                self.change_role(replica_id, ROLES[replica_id])
        for _ in range(300):
            if not self.alive:
                break
            self.dispatch_prefill()
            for replica_id in ROLES:
                self.take_message(replica_id)
                self.decode(replica_id, 1)
            self.submit()
            self.books_agree()
        assert not self.alive, "a request never ended"
        for replica_id, replica in self.replicas.items():
            while replica.inbox:
                self.take_message(replica_id)
            self.decode(replica_id, 12)
        self.books_agree()
        for replica in self.replicas.values():
            assert replica.blocks.num_free_blocks == replica.blocks.num_blocks
            assert replica.credits.num_requests == 0
        assert self.admission.num_promised_seqs == 0 and self.prefill.num_waiting == 0


def check_lives(**configuration):
    machine = type("Machine", (LifeOfRequests,), configuration)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=60, deadline=None, derandomize=True)
    )


@pytest.mark.parametrize("max_long_tokens", [None, 6])
@pytest.mark.parametrize("name", ["fcfs", "sjf", "priority", "edf", "fair"])
def test_life_of_requests(name, max_long_tokens):
    check_lives(policy=QueuePolicy(name, max_wait_s=5.0), max_long_tokens=max_long_tokens)


def test_life_where_a_lost_replica_is_the_only_one_for_some_prompts():
    check_lives(num_blocks=UNEVEN_NUM_BLOCKS)


@pytest.mark.parametrize("max_prompt_len", [None, 9])
@pytest.mark.parametrize("name", ["fcfs", "sjf", "fair"])
def test_life_where_decode_replicas_compute_prompts_too(name, max_prompt_len):
    check_lives(
        policy=QueuePolicy(name, max_wait_s=5.0), local_limits=Limits(8, 3, max_prompt_len=max_prompt_len, stays=True)
    )


@pytest.mark.parametrize("max_long_tokens", [None, 6])
@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_life_where_roles_change_and_pools_cannot_be_mapped(name, max_long_tokens):
    check_lives(
        policy=QueuePolicy(name, max_wait_s=5.0),
        max_long_tokens=max_long_tokens,
        changes_roles=True,
        num_blocks=UNEVEN_NUM_BLOCKS,
    )
