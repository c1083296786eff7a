"""Copies on write beside swaps: when a prompt's step runs, its blocks hold what they held when they were found."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ensemble.cache.block_manager import BlockManager, OutOfBlocks, Owner, SwappableBlocks
from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.cache.prefix_cache import Allocation, PrefixCache, block_hashes

BLOCK_SIZE, NUM_BLOCKS, NUM_HOST_BLOCKS = 2, 6, 8
PROMPTS = [(1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 5, 6), (7, 8), (7, 8, 9, 10), (11, 12, 13, 14, 15, 16)]


class Blocks:
    """The books of a device's and a host's blocks, and what each block holds: the hash of its tokens."""

    def __init__(self) -> None:
        self.cache = PrefixCache(BlockManager(NUM_BLOCKS, BLOCK_SIZE))
        self.blocks = SwappableBlocks(self.cache, BlockManager(NUM_HOST_BLOCKS, BLOCK_SIZE))
        self.device: list[bytes] = [b""] * NUM_BLOCKS
        self.host: list[bytes] = [b""] * NUM_HOST_BLOCKS

    def allocate(self, owner: Owner, prompt: tuple[int, ...]) -> Allocation:
        return self.cache.allocate_prompt(owner, prompt, len(prompt) // BLOCK_SIZE)

    def copy(self, copies: Iterable[tuple[int, int]]) -> None:
        for source, target in copies:
            self.device[target] = self.device[source]

    def compute(self, owner: Owner, prompt: tuple[int, ...], first_block: int = 0) -> None:
        for block_id, content in list(zip(self.cache.blocks_of(owner), of(prompt), strict=True))[first_block:]:
            self.device[block_id] = content
        self.cache.commit(owner, len(prompt))

    def swap_out(self, owner: Owner) -> None:
        for source, target in zip(*self.blocks.begin_swap_out(owner), strict=True):
            self.host[target] = self.device[source]
        self.blocks.end_swap(owner)

    def swap_in(self, owner: Owner) -> list[int]:
        host_ids, device_ids = self.blocks.begin_swap_in(owner, len(self.blocks.host.blocks_of(owner)))
        for source, target in zip(host_ids, device_ids, strict=True):
            self.device[target] = self.host[source]
        self.blocks.end_swap(owner)
        return device_ids


def of(prompt: tuple[int, ...]) -> list[bytes]:
    return block_hashes(prompt, BLOCK_SIZE)


def sequence(number: int) -> Owner:
    return Owner("sequence", number)


class CopiesBesideSwaps(RuleBasedStateMachine):
    """A copy on write has ended when it returns. Then swaps may come between it and the step of its prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Blocks()
        self.num = 0
        self.waiting: dict[Owner, tuple[tuple[int, ...], Allocation]] = {}  # for their step
        self.computed: dict[Owner, tuple[int, ...]] = {}

    def at(self, place: str) -> list[Owner]:
        return [owner for owner in self.computed if self.of.blocks.place_of(owner) == place]

    @rule(prompt=st.sampled_from(PROMPTS))
    def start(self, prompt: tuple[int, ...]) -> None:
        self.num += 1
        owner = sequence(self.num)
        try:
            allocation = self.of.allocate(owner, prompt)
        except OutOfBlocks:
            return
        self.of.copy(allocation.copies)
        self.waiting[owner] = prompt, allocation

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.waiting)))
        prompt, allocation = self.waiting.pop(owner)
        num_found = len(prompt) // BLOCK_SIZE if allocation.copies else allocation.num_cached_tokens // BLOCK_SIZE
        assert [self.of.device[each] for each in allocation.block_ids[:num_found]] == of(prompt)[:num_found]
        self.of.compute(owner, prompt, num_found)
        self.computed[owner] = prompt

    @precondition(lambda self: self.at("device"))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.at("device")))
        if len(self.computed[owner]) // BLOCK_SIZE <= self.of.blocks.host.num_free_blocks:
            self.of.swap_out(owner)

    @precondition(lambda self: self.at("host"))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.at("host")))
        if len(self.computed[owner]) // BLOCK_SIZE <= self.of.cache.num_free_blocks:
            self.of.swap_in(owner)

    @precondition(lambda self: self.waiting or self.computed)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([*self.waiting, *self.computed]))
        self.waiting.pop(owner, None)
        self.computed.pop(owner, None)
        self.of.blocks.free(owner)

    @invariant()
    def what_runs_has_its_own(self) -> None:
        self.of.blocks.check_integrity()
        for owner in self.at("device"):
            found = [self.of.device[block_id] for block_id in self.of.cache.blocks_of(owner)]
            assert found == of(self.computed[owner])


TestCopiesBesideSwaps = CopiesBesideSwaps.TestCase
TestCopiesBesideSwaps.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_copys_blocks_are_given_away_at_once() -> None:
    """So a copy that was merely enqueued would be too late: a swap in on another stream writes into its source."""
    blocks, prompt, other = Blocks(), PROMPTS[1], PROMPTS[4]
    for owner, tokens in ((sequence(1), prompt), (sequence(2), PROMPTS[6][:4]), (sequence(3), other)):
        blocks.allocate(owner, tokens)
        blocks.compute(owner, tokens)
    blocks.swap_out(sequence(3))
    blocks.cache.free(sequence(1))
    [(source, target)] = blocks.allocate(sequence(4), prompt).copies
    blocks.cache.extend(sequence(2), blocks.cache.num_free_blocks - 1)
    assert blocks.swap_in(sequence(3)) == [source] != [target]
    assert blocks.device[source] == of(other)[0]


@pytest.mark.gpu
def test_a_copy_within_the_pool_has_ended_when_it_returns() -> None:
    pool = KVPool(KVLayout(8, 8, 16, 128, torch.float16), 512, torch.device("cuda"))
    pool.tensor[:256] = 1
    torch.cuda._sleep(100_000_000)  # the step launched before
    pool.copy_blocks(list(range(256)), list(range(256, 512)))
    assert torch.cuda.current_stream().query()
    assert bool((pool.tensor == 1).all())
