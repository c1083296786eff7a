"""Decode under a policy, with more sequences than the device's pool holds: the rest waits in the host pool."""

from collections.abc import Set
from dataclasses import dataclass, field

from ensemble.cache.block_manager import Owner, Swap, SwappableBlocks
from ensemble.errors import InternalError
from ensemble.request import Sequence
from ensemble.scheduling.decode_policies import DecodePolicy
from ensemble.scheduling.swapping import Footprint, IterationPlan, Memory, limit_headroom, plan_iteration


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One iteration: start the swaps on their side streams, run the batch, then report it to `ran`."""

    run: list[Sequence] = field(default_factory=list)
    swap_out: list[Swap] = field(default_factory=list)
    swap_in: list[Swap] = field(default_factory=list)
    give_up: list[Sequence] = field(default_factory=list)  # these are to be removed, and computed again


class PreemptiveDecodeScheduler:
    """Which sequences run and where their KV is.

    It owns the blocks of its sequences, `Owner("sequence", request_id)` in both pools, and keeps `Sequence.block_ids`
    true. `now` is in seconds and does not go back. Without a host pool nothing is ever swapped. Unless it `may_give_up`
    sequences for others, all that was added has to fit the pools to its end.
    """

    def __init__(
        self,
        blocks: SwappableBlocks,
        policy: DecodePolicy,
        *,
        max_num_seqs: int,
        headroom_blocks: int = 0,
        may_give_up: bool = False,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.may_give_up = may_give_up
        # Each of the batch may need a block in an iteration, and a copy takes time; giving up takes none.
        self.headroom_blocks = max(headroom_blocks, max_num_seqs) if blocks.host.num_blocks else 0
        self._policy = policy
        self._sequences: dict[int, Sequence] = {}
        self._footprints: dict[int, Footprint] = {}
        self._retired: dict[int, int] = {}  # request_id |-> blocks; out of the order, read by a launched iteration
        self._removed: set[int] = set()  # gone, but still being copied
        self._running: list[int] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    @property
    def num_swapped_seqs(self) -> int:
        """Sequences that are not wholly on the device."""
        return sum(footprint.place != "device" for footprint in self._footprints.values())

    def has_room_for(self, num_blocks: int) -> bool:
        """Whether a sequence of `num_blocks` may be brought onto the device: beside others it leaves the headroom."""
        headroom = self.headroom_blocks if self._sequences else 0
        if self.may_give_up:  # who comes in where the next blocks lack would be given up at once, or others for it
            headroom = max(headroom, len(self._sequences))
        headroom = limit_headroom(headroom, self.blocks.device.num_blocks)
        return num_blocks + headroom <= self.blocks.device.num_free_blocks

    def add(
        self,
        sequence: Sequence,
        now: float,
        *,
        priority: int = 0,
        join_cost_s: float = 0.0,
        num_unread_tokens: int = 0,
    ) -> None:
        """A sequence joins whose KV is in the blocks it owns on the device, or will be when what is launched has run.

        `num_unread_tokens`: 1 where its first token is not committed yet.
        """
        request_id = sequence.request_id
        if request_id in self._sequences or request_id in self._retired or request_id in self._removed:
            raise InternalError(f"request {request_id} already decodes")
        self._sequences[request_id] = sequence
        self._footprints[request_id] = Footprint(request_id, "device", len(sequence.block_ids), 0)
        self._measure_growth(request_id, num_unread_tokens)
        self._policy.add(sequence, now, priority, join_cost_s)

    def next_plan(self, now: float, num_wanted_blocks: int = 0) -> DecodePlan:
        """Decides the next iteration. `num_wanted_blocks` are needed by sequences that wait to be pulled in."""
        return self._carry_out(self._plan(now, num_wanted_blocks, frozenset(), self.max_num_seqs))

    def next_part(
        self, now: float, num_wanted_blocks: int, request_ids_in_flight: Set[int], num_parts: int
    ) -> DecodePlan:
        """The same, of an iteration in `num_parts`, of which others are in flight, with these sequences.

        Nothing is moved or given up beside them: a plan that would is empty, until they are back.
        """
        in_flight = request_ids_in_flight & self._sequences.keys()
        max_num_seqs = -(-min(len(self._sequences), self.max_num_seqs) // num_parts)
        plan = self._plan(now, num_wanted_blocks, in_flight, max(1, max_num_seqs))
        moves = plan.swap_out or plan.swap_in or plan.give_up
        return DecodePlan() if in_flight and moves else self._carry_out(plan)

    def _plan(self, now: float, num_wanted_blocks: int, in_flight: Set[int], max_num_seqs: int) -> IterationPlan:
        order = [self._footprints[request_id] for request_id in self._policy.order(now) if request_id not in in_flight]
        memory = Memory(
            self.blocks.device.num_blocks,
            self.blocks.device.num_free_blocks,
            self.blocks.num_returning_blocks + sum(self._retired.values()),
            self.blocks.host.num_free_blocks,
            num_wanted_blocks,
        )
        return plan_iteration(order, memory, max_num_seqs, self.headroom_blocks, may_give_up=self.may_give_up)

    def _carry_out(self, plan: IterationPlan) -> DecodePlan:
        for request_id in plan.run:
            self._grow(request_id)
        self._running = plan.run
        return DecodePlan(
            [self._sequences[request_id] for request_id in plan.run],
            [self._swap_out(request_id) for request_id in plan.swap_out],
            [self._swap_in(request_id) for request_id in plan.swap_in],
            [self._sequences[request_id] for request_id in plan.give_up],
        )

    def ran(self, seconds: float, now: float, num_unread_tokens: int = 0) -> None:
        """The planned batch has run and took `seconds`, or has been launched and is taken to.

        `num_unread_tokens`, of each of its sequences, are not committed yet: 1 where the next iteration is planned
        before the tokens of this one are read.
        """
        running = [request_id for request_id in self._running if request_id in self._sequences]
        self._running = []
        self._policy.ran(running, seconds, now)
        for request_id in running:
            self._measure_growth(request_id, num_unread_tokens)

    def retire(self, request_id: int) -> None:
        """Ends a sequence on the device that a launched iteration still uses: `remove` it when that has run."""
        if self._footprints[request_id].place != "device":
            raise InternalError(f"request {request_id} cannot be retired: it is not on the device")
        del self._sequences[request_id]
        self._policy.remove(request_id)
        self._retired[request_id] = self._footprints.pop(request_id).num_blocks

    def swap_ended(self, request_id: int) -> bool:
        """The copy's event has completed. True if the sequence was removed meanwhile: now all its blocks are free."""
        owner = Owner("sequence", request_id)
        self.blocks.end_swap(owner)
        if request_id in self._removed:
            self._removed.remove(request_id)
            self.blocks.free(owner)
            return True
        footprint = self._footprints[request_id]
        footprint.place = "host" if footprint.place == "out" else "device"
        return False

    def remove(self, request_id: int) -> bool:
        """Ends a sequence. True if its blocks are free now; False if that waits for the end of a copy."""
        if request_id in self._retired:
            del self._retired[request_id]
            self.blocks.free(Owner("sequence", request_id))
            return True
        del self._sequences[request_id]
        self._policy.remove(request_id)
        place = self._footprints.pop(request_id).place
        if place in ("out", "in"):
            self._removed.add(request_id)
            return False
        self.blocks.free(Owner("sequence", request_id))
        return True

    def may_leave(self, request_id: int) -> bool:
        """Whether a sequence's KV is on the device, so that another replica can read it."""
        footprint = self._footprints.get(request_id)
        return footprint is not None and footprint.place == "device"

    def take(self, request_id: int) -> None:
        """Ends a sequence that may leave, or is retired. Its blocks are the caller's, with their owner as it was."""
        if self._retired.pop(request_id, None) is None:
            del self._sequences[request_id], self._footprints[request_id]
            self._policy.remove(request_id)

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        self.blocks.check_integrity()
        for request_id, footprint in self._footprints.items():
            owner = Owner("sequence", request_id)
            if self.blocks.place_of(owner) != footprint.place:
                raise InternalError(f"request {request_id} is taken to be at {footprint.place}")
            if footprint.place == "device" and list(self.blocks.device.blocks_of(owner)) != (
                self._sequences[request_id].block_ids
            ):
                raise InternalError(f"request {request_id} has a block table that is not true")

    def _measure_growth(self, request_id: int, num_unread_tokens: int = 0) -> None:
        """The next iteration stores the KV of the last token."""
        footprint = self._footprints[request_id]
        num_blocks = self.blocks.device.blocks_for(self._sequences[request_id].num_tokens + num_unread_tokens)
        footprint.num_growth_blocks = max(0, num_blocks - footprint.num_blocks)

    def _grow(self, request_id: int) -> None:
        footprint = self._footprints[request_id]
        if footprint.num_growth_blocks > 0:
            block_ids = self.blocks.device.extend(Owner("sequence", request_id), footprint.num_growth_blocks)
            self._sequences[request_id].block_ids += block_ids
            footprint.num_blocks += footprint.num_growth_blocks
            footprint.num_growth_blocks = 0

    def _swap_out(self, request_id: int) -> Swap:
        footprint = self._footprints[request_id]
        source, destination = self.blocks.begin_swap_out(Owner("sequence", request_id))
        footprint.place = "out"
        footprint.num_blocks += footprint.num_growth_blocks
        footprint.num_growth_blocks = 0
        self._sequences[request_id].block_ids = []
        return Swap(request_id, source, destination)

    def _swap_in(self, request_id: int) -> Swap:
        footprint = self._footprints[request_id]
        owner = Owner("sequence", request_id)
        source, destination = self.blocks.begin_swap_in(owner, footprint.num_blocks)
        footprint.place = "in"
        self._sequences[request_id].block_ids = list(self.blocks.device.blocks_of(owner))
        return Swap(request_id, source, destination)
