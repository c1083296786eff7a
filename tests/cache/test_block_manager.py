import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ensemble.cache.block_manager import BlockManager, OutOfBlocks, Owner, SwappableBlocks
from ensemble.errors import InternalError

NUM_BLOCKS = 12


def test_blocks_for_rounds_up():
    manager = BlockManager(num_blocks=8, block_size=16)
    assert [manager.blocks_for(n) for n in (0, 1, 16, 17, 128)] == [0, 1, 1, 2, 8]


def test_a_refused_allocation_takes_nothing():
    manager = BlockManager(num_blocks=4, block_size=16)
    sequence = Owner("sequence", 1)
    manager.allocate(sequence, 3)
    with pytest.raises(OutOfBlocks, match="sequence 2 needs 2 blocks, 1 are free"):
        manager.allocate(Owner("sequence", 2), 2)
    with pytest.raises(OutOfBlocks):
        manager.extend(sequence, 2)
    assert manager.num_free_blocks == 1
    assert len(manager.blocks_of(sequence)) == 3
    assert not manager.blocks_of(Owner("sequence", 2))


def test_a_lease_outlives_the_sequence_it_came_from():
    manager = BlockManager(num_blocks=4, block_size=16)
    block_ids = manager.allocate(Owner("sequence", 7), 3)
    manager.reassign(Owner("sequence", 7), Owner("transfer", 0))
    with pytest.raises(InternalError):
        manager.free(Owner("sequence", 7))
    assert manager.allocate(Owner("sequence", 7), 1)[0] not in block_ids  # the id may come back while the lease lasts
    manager.free(Owner("transfer", 0))
    assert manager.num_free_blocks == 3
    with pytest.raises(InternalError):
        manager.free(Owner("transfer", 0))


def test_an_owner_holds_one_allocation():
    manager = BlockManager(num_blocks=4, block_size=16)
    manager.allocate(Owner("sequence", 1), 1)
    manager.allocate(Owner("sequence", 2), 1)
    with pytest.raises(InternalError):
        manager.allocate(Owner("sequence", 1), 1)
    with pytest.raises(InternalError):
        manager.reassign(Owner("sequence", 1), Owner("sequence", 2))
    manager.check_integrity()
    assert manager.num_free_blocks == 2


owners = st.builds(Owner, st.sampled_from(["sequence", "transfer"]), st.integers(0, 5))


class BlockManagerMachine(RuleBasedStateMachine):
    """The oracle is a list: block_id |-> owner or None."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, block_size=4)
        self.owner_of = [None] * NUM_BLOCKS
        self.holding = {}

    def give(self, owner, block_ids):
        for block_id in block_ids:
            assert self.owner_of[block_id] is None
            self.owner_of[block_id] = owner
        self.holding.setdefault(owner, []).extend(block_ids)

    @rule(owner=owners, num_blocks=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, owner, num_blocks):
        if owner in self.holding or num_blocks > self.owner_of.count(None):
            with pytest.raises(InternalError):
                self.manager.allocate(owner, num_blocks)
        else:
            block_ids = self.manager.allocate(owner, num_blocks)
            assert len(block_ids) == num_blocks
            self.give(owner, block_ids)

    @rule(owner=owners, num_blocks=st.integers(0, 4))
    def extend(self, owner, num_blocks):
        if owner not in self.holding or num_blocks > self.owner_of.count(None):
            with pytest.raises(InternalError):
                self.manager.extend(owner, num_blocks)
        else:
            block_ids = self.manager.extend(owner, num_blocks)
            assert len(block_ids) == num_blocks
            self.give(owner, block_ids)

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), new_owner=owners)
    def reassign(self, data, new_owner):
        owner = data.draw(st.sampled_from(sorted(self.holding)))
        if new_owner in self.holding:
            with pytest.raises(InternalError):
                self.manager.reassign(owner, new_owner)
        else:
            self.manager.reassign(owner, new_owner)
            self.holding[new_owner] = self.holding.pop(owner)
            self.owner_of = [new_owner if held == owner else held for held in self.owner_of]

    @rule(owner=owners)
    def free(self, owner):
        if owner not in self.holding:
            with pytest.raises(InternalError):
                self.manager.free(owner)
        else:
            self.manager.free(owner)
            del self.holding[owner]
            self.owner_of = [None if held == owner else held for held in self.owner_of]

    @invariant()
    def agrees(self):
        self.manager.check_integrity()
        assert self.manager.num_free_blocks == self.owner_of.count(None)
        for owner, block_ids in self.holding.items():
            assert list(self.manager.blocks_of(owner)) == block_ids


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_copy_holds_its_blocks_on_both_sides_until_it_ends():
    blocks = SwappableBlocks(BlockManager(4, block_size=16), BlockManager(4, block_size=16))
    owner = Owner("sequence", 1)
    device_ids = blocks.device.allocate(owner, 2)
    source, destination = blocks.begin_swap_out(owner)
    assert source == device_ids and len(destination) == 2
    assert (blocks.place_of(owner), blocks.num_returning_blocks) == ("out", 2)
    assert (blocks.device.num_free_blocks, blocks.host.num_free_blocks) == (2, 2)
    with pytest.raises(InternalError):
        blocks.free(owner)
    with pytest.raises(InternalError):
        blocks.begin_swap_in(owner, 3)
    blocks.end_swap(owner)
    assert (blocks.place_of(owner), blocks.device.num_free_blocks) == ("host", 4)
    source, destination = blocks.begin_swap_in(owner, 3)  # one more, to grow
    assert len(source) == len(destination) == 2 and blocks.device.num_free_blocks == 1
    blocks.check_integrity()
    blocks.end_swap(owner)
    assert (blocks.place_of(owner), blocks.host.num_free_blocks) == ("device", 4)
    blocks.free(owner)
    assert blocks.place_of(owner) is None
    with pytest.raises(InternalError):
        blocks.end_swap(owner)
    blocks.check_integrity()


def test_a_full_host_pool_refuses_and_nothing_has_changed():
    blocks = SwappableBlocks(BlockManager(4, block_size=16), BlockManager(1, block_size=16))
    owner = Owner("sequence", 1)
    blocks.device.allocate(owner, 2)
    with pytest.raises(OutOfBlocks):
        blocks.begin_swap_out(owner)
    assert blocks.place_of(owner) == "device"
    blocks.check_integrity()
