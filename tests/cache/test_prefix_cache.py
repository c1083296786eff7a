import subprocess
import sys
from copy import deepcopy
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ensemble.cache.block_manager import BlockManager, OutOfBlocks, Owner
from ensemble.cache.prefix_cache import PrefixCache, block_hashes
from ensemble.errors import InternalError

B = 4
PROMPT = list(range(100, 118))  # four full blocks and two tokens


def sequence(request_id):
    return Owner("sequence", request_id)


def make_cache(num_blocks=10):
    return PrefixCache(BlockManager(num_blocks, B))


def prefill(cache, owner, token_ids):
    allocation = cache.allocate_prompt(owner, token_ids, cache.blocks.blocks_for(len(token_ids)))
    cache.commit(owner, len(token_ids))
    return allocation


def num_cached_tokens(cache, token_ids):
    """Tokens of a prompt that an allocation would find now, the last token never among them."""
    found = deepcopy(cache).lease(Owner("transfer", -1), block_hashes(token_ids, B))
    return min(len(found) * B, len(token_ids) - 1)


def test_a_prefix_is_shared_while_in_use_and_after():
    cache = make_cache()
    first = prefill(cache, sequence(1), PROMPT)
    assert first.num_cached_tokens == 0 and not first.copies
    second = prefill(cache, sequence(2), [*PROMPT[:9], 7, 7, 7])
    assert second.num_cached_tokens == 8
    assert second.block_ids[:2] == first.block_ids[:2] and second.block_ids[2] not in first.block_ids
    cache.free(sequence(1))
    cache.free(sequence(2))
    assert cache.num_free_blocks == 10
    assert num_cached_tokens(cache, PROMPT) == 16
    assert prefill(cache, sequence(3), PROMPT).num_cached_tokens == 16
    assert (cache.num_hit_tokens, cache.num_queried_tokens) == (24, 48)


def test_nothing_is_shared_before_it_is_computed():
    cache = make_cache()
    cache.allocate_prompt(sequence(1), PROMPT, 5)
    assert num_cached_tokens(cache, PROMPT) == 0
    cache.commit(sequence(1), 11)  # a chunk
    assert num_cached_tokens(cache, PROMPT) == 8
    cache.free(sequence(1))  # cancelled in the middle: what is computed stays
    assert num_cached_tokens(cache, PROMPT) == 8


def test_equal_blocks_after_different_beginnings_are_different():
    cache = make_cache()
    prefill(cache, sequence(1), [1, 2, 3, 4, 9, 9, 9, 9])
    assert num_cached_tokens(cache, [5, 6, 7, 8, 9, 9, 9, 9, 0]) == 0


def test_a_prompt_cached_whole_writes_its_last_token_to_a_copy():
    cache = make_cache()
    first = prefill(cache, sequence(1), PROMPT[:8])
    second = cache.allocate_prompt(sequence(2), PROMPT[:8], 2)
    assert second.num_cached_tokens == 7
    assert second.copies == [(first.block_ids[1], second.block_ids[1])]
    assert second.block_ids[0] == first.block_ids[0] and second.block_ids[1] != first.block_ids[1]


def test_without_room_for_the_copy_the_last_block_is_computed_again():
    cache = make_cache(num_blocks=2)
    prefill(cache, sequence(1), PROMPT[:8])
    cache.free(sequence(1))
    again = cache.allocate_prompt(sequence(2), PROMPT[:8], 2)
    assert again.num_cached_tokens == 4 and not again.copies
    cache.check_integrity()


def test_the_least_recently_used_goes_first_and_of_a_prompt_its_end():
    cache = make_cache(num_blocks=8)
    old, new = [1] * 12, [2] * 12
    prefill(cache, sequence(1), old)
    prefill(cache, sequence(2), new)
    cache.free(sequence(1))
    cache.free(sequence(2))
    prefill(cache, sequence(3), [3] * 16)  # two were free, two of the oldest prompt's three are evicted
    assert num_cached_tokens(cache, [*old, 0]) == 4
    assert num_cached_tokens(cache, [*new, 0]) == 12
    assert len(cache.take_events()[1]) == 2


def test_blocks_in_use_are_never_evicted():
    cache = make_cache(num_blocks=4)
    prefill(cache, sequence(1), [1] * 12)
    with pytest.raises(OutOfBlocks):
        cache.allocate_prompt(sequence(2), [2] * 8, 2)
    assert cache.num_free_blocks == 1
    with pytest.raises(InternalError):
        cache.free(sequence(2))
    cache.check_integrity()


def test_a_lease_keeps_shared_blocks_in_use():
    cache = make_cache(num_blocks=4)
    prefill(cache, sequence(1), [1] * 12)
    cache.reassign(sequence(1), Owner("transfer", 0))
    with pytest.raises(OutOfBlocks):
        cache.allocate_prompt(sequence(2), [2] * 8, 2)
    cache.free(Owner("transfer", 0))
    assert prefill(cache, sequence(2), [2] * 8).num_cached_tokens == 0


def test_events_tell_an_index_what_the_cache_holds():
    cache = make_cache(num_blocks=3)
    index = set()
    for request_id, token in enumerate([1, 2, 1, 3, 3, 2]):
        prefill(cache, sequence(request_id), [token] * 9)
        cache.free(sequence(request_id))
        stored, evicted = cache.take_events()
        index = (index - set(evicted)) | set(stored)
        for other in (1, 2, 3):
            hashes = block_hashes([other] * 9, B)
            num_known = next((i for i, each in enumerate(hashes) if each not in index), len(hashes))
            assert num_cached_tokens(cache, [other] * 9) == num_known * B


def test_hashes_are_the_same_in_every_process():
    code = f"from ensemble.cache.prefix_cache import block_hashes; print(block_hashes({PROMPT}, {B})[-1].hex())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == block_hashes(PROMPT, B)[-1].hex()


class PrefixCacheMachine(RuleBasedStateMachine):
    """A pool that really keeps content: every slot holds the tokens up to its position, as KV depends on them all."""

    def __init__(self):
        super().__init__()
        self.cache = make_cache(num_blocks=9)
        self.pool = [[None] * B for _ in range(9)]
        self.prompts = {}  # owner |-> [token_ids, block_ids, computed tokens]
        self.index = set()  # hashes of what is cached, by the events
        self.num_requests = 0

    def num_cached_tokens(self, tokens):
        """That an allocation is to find now, the last token never among them."""
        stored, evicted = self.cache.take_events()
        self.index = (self.index - set(evicted)) | set(stored)
        known = list(takewhile(self.index.__contains__, block_hashes(tokens, B)))
        return min(len(known) * B, len(tokens) - 1)

    @rule(tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=20), num_output=st.integers(0, 5))
    def allocate(self, tokens, num_output):
        owner = sequence(self.num_requests)
        num_blocks = self.cache.blocks.blocks_for(len(tokens) + num_output)
        num_found = self.num_cached_tokens(tokens)
        num_free_blocks = self.cache.num_free_blocks
        try:
            allocation = self.cache.allocate_prompt(owner, tokens, num_blocks)
        except OutOfBlocks:
            assert num_free_blocks < num_blocks
            assert self.cache.num_free_blocks == num_free_blocks
            return
        self.num_requests += 1
        assert len(allocation.block_ids) == len(set(allocation.block_ids)) == num_blocks
        assert allocation.num_cached_tokens in (num_found, num_found // B * B)
        for source, destination in allocation.copies:
            self.pool[destination] = list(self.pool[source])
        self.prompts[owner] = [tokens, allocation.block_ids, allocation.num_cached_tokens]

    @rule(tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=20))
    def arrive(self, tokens):
        """Of the blocks of a hand-off those are copied, by `compute`, that are not here."""
        owner, num_blocks = sequence(self.num_requests), self.cache.blocks.blocks_for(len(tokens))
        num_free_blocks = self.cache.num_free_blocks
        try:
            num_here = self.cache.allocate_arrival(owner, tokens, num_blocks)
        except OutOfBlocks:
            assert num_free_blocks < num_blocks and self.cache.num_free_blocks == num_free_blocks
            return
        self.num_requests += 1
        block_ids = list(self.cache.blocks_of(owner))
        assert num_here < len(block_ids) == num_blocks
        self.prompts[owner] = [tokens, block_ids, num_here * B]

    @rule(tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=B, max_size=20))
    def prefix_arrives(self, tokens):
        """Of a prefix that another replica has cached those blocks are copied, by `compute`, that are not here."""
        owner, hashes = Owner("transfer", self.num_requests), block_hashes(tokens, B)
        num_free_blocks = self.cache.num_free_blocks
        try:
            num_here = self.cache.allocate_prefix(owner, hashes)
        except OutOfBlocks:
            assert num_free_blocks < len(hashes) and self.cache.num_free_blocks == num_free_blocks
            return
        self.num_requests += 1
        block_ids = list(self.cache.blocks_of(owner))
        assert len(block_ids) == len(hashes)
        self.prompts[owner] = [tokens[: len(hashes) * B], block_ids, num_here * B]

    @rule(tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=20))
    def keep_for_another_replica(self, tokens):
        """What is cached of a prefix is leased, and evicted by nobody."""
        owner, num_tokens = Owner("transfer", self.num_requests), self.num_cached_tokens([*tokens, 3])
        block_ids = self.cache.lease(owner, block_hashes(tokens, B))
        assert len(block_ids) * B == num_tokens
        assert (owner in self.cache) == bool(block_ids)
        if block_ids:
            self.num_requests += 1
            self.prompts[owner] = [tokens[:num_tokens], block_ids, num_tokens]

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), token=st.sampled_from([1, 1, 2]))
    def answer(self, data, token):
        """A sequence that has its prompt decodes as far as its blocks reach, and ends."""
        owner = self.draw_owner(data)
        tokens, block_ids, num_computed = self.prompts[owner]
        if num_computed < len(tokens):
            return
        for position in range(len(tokens), len(block_ids) * B):
            tokens = [*tokens, token]
            self.pool[block_ids[position // B]][position % B] = tuple(tokens)
        self.cache.store(owner, tokens)
        self.cache.free(owner)
        del self.prompts[owner]
        assert self.num_cached_tokens([*tokens, 3]) >= min(1, len(tokens) // B) * B

    @rule(num_blocks=st.integers(0, 4))
    def allocate_unshared(self, num_blocks):
        """For what is no prompt: a sequence that arrives, or comes back from the host pool."""
        owner = sequence(self.num_requests)
        if num_blocks > self.cache.num_free_blocks:
            with pytest.raises(OutOfBlocks):
                self.cache.allocate(owner, num_blocks)
            return
        self.num_requests += 1
        block_ids = self.cache.allocate(owner, num_blocks)
        assert len(block_ids) == num_blocks
        for block_id in block_ids:
            assert all(block_id not in held for _, held, _ in self.prompts.values())
            self.pool[block_id] = [None] * B
        self.prompts[owner] = [[], block_ids, 0]

    def draw_owner(self, data):
        return data.draw(st.sampled_from(sorted(self.prompts)))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), length=st.integers(1, 20))
    def compute(self, data, length):
        owner = self.draw_owner(data)
        tokens, block_ids, num_computed = self.prompts[owner]
        end = min(len(tokens), num_computed + length)
        for position in range(num_computed, end):
            self.pool[block_ids[position // B]][position % B] = tuple(tokens[: position + 1])
        self.prompts[owner][2] = end
        self.cache.commit(owner, end)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), num_blocks=st.integers(1, 2))
    def extend(self, data, num_blocks):
        owner = self.draw_owner(data)
        if num_blocks > self.cache.num_free_blocks:
            with pytest.raises(OutOfBlocks):
                self.cache.extend(owner, num_blocks)
        else:
            for block_id in self.cache.extend(owner, num_blocks):
                assert all(block_id not in block_ids for _, block_ids, _ in self.prompts.values())
                self.prompts[owner][1].append(block_id)
                self.pool[block_id] = [None] * B

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def lease(self, data):
        owner = self.draw_owner(data)
        if owner.kind == "sequence":
            self.cache.reassign(owner, Owner("transfer", owner.id))
            self.prompts[Owner("transfer", owner.id)] = self.prompts.pop(owner)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def free(self, data):
        owner = self.draw_owner(data)
        self.cache.free(owner)
        del self.prompts[owner]

    @invariant()
    def content_is_right(self):
        self.cache.check_integrity()
        for owner, (tokens, block_ids, num_computed) in self.prompts.items():
            assert list(self.cache.blocks_of(owner)) == block_ids
            for position in range(num_computed):
                assert self.pool[block_ids[position // B]][position % B] == tuple(tokens[: position + 1])

    def teardown(self):
        for owner in self.prompts:
            self.cache.free(owner)
        self.cache.check_integrity()
        assert self.cache.num_free_blocks == 9


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
