"""The sequences that decode at a replica, from when they join until they have left.

    add --> decode <--> swapped --+--ended, or cancelled--> blocks free
                                  +--given up-------------> blocks free: the router has it computed again
                                  +--goes on elsewhere----> blocks lent to its reader

Who leaves is in no step that is launched from then on. But launched ones, and copies, may still use its blocks, so it
has left only when these have ended.
"""

from collections.abc import Iterator
from typing import Literal, TypeAlias

from ensemble.cache.block_manager import Owner, SwappableBlocks
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.cache.swapper import Swapper
from ensemble.protocol.router_replica import Event, KVHandoff
from ensemble.replicas.launched_steps import LaunchedSteps, Step
from ensemble.replicas.lending import Lending
from ensemble.replicas.loop_settings import LoopSettings
from ensemble.replicas.preemptive_decode import DecodePlan, PreemptiveDecodeScheduler
from ensemble.replicas.reports import SwapReports
from ensemble.request import Request, Sequence
from ensemble.scheduling.decode_policies import make_decode_policy

_Way: TypeAlias = Literal["given up", "handed off"]


class RunningSequences:
    """Owns their blocks, on the device and in the host pool; `block_bytes` is the size of one, of all ranks."""

    def __init__(
        self,
        blocks: SwappableBlocks,
        settings: LoopSettings,
        launched: LaunchedSteps,
        lending: Lending,
        swapper: Swapper,
        block_bytes: int,
    ) -> None:
        self._blocks = blocks
        self._launched = launched
        self._lending = lending
        self._swapper = swapper
        self._scheduler = PreemptiveDecodeScheduler(
            blocks,
            make_decode_policy(settings.policy),
            max_num_seqs=settings.max_num_seqs,
            headroom_blocks=settings.headroom_blocks,
            may_give_up=settings.admission == "optimistic",
        )
        # Under fcfs an arrival comes after all that are here: none of them makes room for it.
        self._makes_room = settings.policy.fills_host_pool
        self._sequences: dict[int, Sequence] = {}  # request_id |-> has not left
        self._leaving: dict[int, _Way] = {}  # request_id |-> how, once its launched steps have run
        self._swap_reports = SwapReports(block_bytes, blocks.host.num_blocks)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    @property
    def request_ids(self) -> list[int]:
        """Of all that have not left."""
        return list(self._sequences)

    @property
    def requests(self) -> Iterator[Request]:
        """Of all that have not left."""
        return (each.request for each in self._sequences.values())

    @property
    def num_going_on(self) -> int:
        """Sequences that are to be in further steps, the swapped ones too."""
        return len(self._scheduler)

    @property
    def num_swapped(self) -> int:
        return self._scheduler.num_swapped_seqs

    def has_room_for(self, num_blocks: int) -> bool:
        """Whether others may take so many of the device's blocks, beside what the sequences here will need."""
        return self._scheduler.has_room_for(num_blocks)

    def add(self, sequence: Sequence, now: float, join_cost_s: float, num_unread_tokens: int = 0) -> None:
        """`num_unread_tokens`: 1 where its first token is not committed yet. `join_cost_s`: what its KV has cost."""
        self._sequences[sequence.request_id] = sequence
        self._scheduler.add(
            sequence,
            now,
            priority=sequence.request.priority,
            join_cost_s=join_cost_s,
            num_unread_tokens=num_unread_tokens,
        )

    # ---- a step

    def next_plan(self, now: float, num_wanted_blocks: int) -> DecodePlan:
        """Who is in the next step; who is to be given up for it. The swaps have been started: before the step is
        launched, so that a copy out waits for the steps that wrote its blocks alone."""
        num_wanted_blocks = num_wanted_blocks if self._makes_room else 0
        if (num_places := self._launched.num_places) > 1:
            plan = self._scheduler.next_part(now, num_wanted_blocks, self._launched.request_ids, num_places)
        else:
            plan = self._scheduler.next_plan(now, num_wanted_blocks)
        for swap in plan.swap_out:
            self._swapper.start(swap, "out")
        for swap in plan.swap_in:
            self._swapper.start(swap, "in")
        self._swap_reports.num_preemptions += len(plan.swap_out)
        return plan

    def ran(self, seconds: float, now: float, num_unread_tokens: int) -> None:
        """The planned step took so long; of each of its sequences so many tokens are not committed yet."""
        self._scheduler.ran(seconds, now, num_unread_tokens)
        for request_id in self._launched.request_ids:
            sequence = self._sequences.get(request_id)  # None: a prompt that is not finished, or does not decode here
            if sequence is not None and sequence.num_left_tokens <= 1:  # its unread token is the last it may have
                self._retire(request_id)

    def end_swaps(self) -> list[int]:
        """Copies that have ended. Returns the request ids of those that have left with that."""
        left = []
        for swapped in self._swapper.completed():
            self._swap_reports.add(swapped)
            if self._scheduler.swap_ended(swapped.request_id):
                left.append(swapped.request_id)
        return left

    def swap_report(self) -> list[Event]:
        return self._swap_reports.take(self.num_swapped, self._blocks.host.num_free_blocks)

    # ---- who leaves

    def leave(self, request_id: int) -> bool:
        """Ends a sequence. True if it has left: its blocks are free."""
        if request_id in self._launched.request_ids:
            self._retire(request_id)
            return False
        self._forget(request_id)
        return self._scheduler.remove(request_id)

    def cancel(self, request_id: int) -> bool:
        """The same, before its end."""
        self._sequences[request_id].finish_reason = "cancelled"
        return self.leave(request_id)

    def give_up(self, sequences: list[Sequence]) -> list[int]:
        """Their blocks are for others. Returns the request ids of those that have left; see `given_up_after`."""
        self._leaving.update((each.request_id, "given up") for each in sequences)
        return [each.request_id for each in sequences if self.leave(each.request_id)]

    def given_up_after(self, step: Step) -> list[int]:
        """Request ids of those given up that have left, since the step is committed."""
        return [each for each in self._leaving_after(step, "given up") if self.leave(each)]

    def hand_off(self, request_ids: list[int]) -> tuple[list[KVHandoff], list[int]]:
        """Those of these that are here go on elsewhere. Returns the hand-offs of those that have left (see
        `handed_off_after`), and the request ids of those that stay: whose KV is not on the device."""
        going, staying = [], []
        for request_id in request_ids:
            if request_id not in self._sequences or self._sequences[request_id].is_finished:
                continue
            if self._scheduler.may_leave(request_id):
                going.append(request_id)
            elif request_id in self._scheduler:
                staying.append(request_id)
        handoffs = []
        for request_id in going:
            if request_id in self._launched.request_ids:
                self._leaving[request_id] = "handed off"
                self._retire(request_id)
            else:
                handoffs.append(self._hand_over(request_id))
        return handoffs, staying

    def handed_off_after(self, step: Step) -> list[KVHandoff]:
        """Hand-offs of those that have left, since the step is committed."""
        going = self._leaving_after(step, "handed off")
        return [self._hand_over(each) for each in going if each not in self._launched.request_ids]

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        self._scheduler.check_integrity()

    def _leaving_after(self, step: Step, way: _Way) -> list[int]:
        """Request ids of a committed step that leave this way. Who has ended by its token or a cancel has ended."""
        if not self._leaving:
            return []
        ids = [each.request_id for each in step.sequences if not each.is_finished]
        return [request_id for request_id in ids if self._leaving.get(request_id) == way]

    def _retire(self, request_id: int) -> None:
        """Launched steps use it: it is in no other, and keeps its blocks till then."""
        if request_id in self._scheduler:
            self._scheduler.retire(request_id)

    def _hand_over(self, request_id: int) -> KVHandoff:
        self._scheduler.take(request_id)
        return self._lending.offer(self._forget(request_id))

    def _forget(self, request_id: int) -> Sequence:
        """Its blocks can be shared when they are free: the next turn of a conversation begins with them."""
        self._leaving.pop(request_id, None)
        self._launched.forget(request_id)
        sequence, owner, cache = self._sequences.pop(request_id), Owner("sequence", request_id), self._blocks.device
        if isinstance(cache, PrefixCache) and self._blocks.place_of(owner) == "device":
            num_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
            cache.store(owner, sequence.token_ids(0, num_tokens))
        return sequence
