"""Which sequences run in the next iteration, and which change between device and host meanwhile.

Sequences are due, in the policy's order, as long as together they fit the pool less the headroom, and the batch. A
decision is data, and keeps these rules:
- the batch is filled in order with sequences on the device, due or not; due ones get blocks to grow first;
- a pass swaps out or swaps in, never both, so no sequence goes both ways in it;
- swapping out is proactive: it keeps `headroom` blocks free for the next iterations, and makes room for due sequences
  on the host, at the cost of those that are not due (whole sequences, from the order's end);
- sequences come back in order, leaving the headroom; those that are not due leave it twice, so that the growth of the
  batch does not push them out again;
- where that is allowed, and no swap makes room for a due sequence to grow, or for the first to come back, sequences
  from the order's end are given up: they have to be computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Place: TypeAlias = Literal["device", "host", "out", "in"]  # "out" and "in": being copied, blocks on both sides

_MAX_HEADROOM = 8  # the headroom is at most one part in so many of the pool


@dataclass(slots=True, eq=False)
class Footprint:
    """What a sequence takes, in blocks."""

    request_id: int
    place: Place
    num_blocks: int  # held on the device; on the host: to be held on the device when it comes back
    num_growth_blocks: int  # lacking for the next iteration; none on the host


@dataclass(frozen=True, slots=True)
class Memory:
    """The pools, in blocks."""

    num_blocks: int  # of the device
    num_free_blocks: int
    num_returning_blocks: int  # free when the swaps under way, and the launched iteration, have ended
    num_free_host_blocks: int
    num_wanted_blocks: int = 0  # for sequences that wait to be admitted


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """Requests, by id, in the policy's order."""

    run: list[int]
    swap_out: list[int] = field(default_factory=list)
    swap_in: list[int] = field(default_factory=list)
    give_up: list[int] = field(default_factory=list)


def limit_headroom(headroom: int, num_blocks: int) -> int:
    """The headroom that a pool of `num_blocks` can spare."""
    return min(headroom, num_blocks // _MAX_HEADROOM)


def plan_iteration(
    order: Sequence[Footprint], memory: Memory, max_num_seqs: int, headroom: int, *, may_give_up: bool = False
) -> IterationPlan:
    """Decides the next iteration of the sequences in `order`, the one to run first at the front."""
    headroom = limit_headroom(headroom, memory.num_blocks)
    num_due = _num_due(order, memory.num_blocks - headroom, max_num_seqs)
    due, others = order[:num_due], order[num_due:]
    batch = _fill_batch(due, others, memory.num_free_blocks, max_num_seqs, headroom)
    batch = batch or _fill_batch(due, others, memory.num_free_blocks, max_num_seqs, headroom=0)
    num_free_blocks = memory.num_free_blocks - sum(each.num_growth_blocks for each in batch)

    in_batch = {each.request_id for each in batch}
    num_lacking_blocks = sum(
        each.num_growth_blocks for each in due if each.place == "device" and each.request_id not in in_batch
    )
    num_due_blocks = sum(each.num_blocks for each in due if each.place == "host")
    target = headroom + num_lacking_blocks + num_due_blocks + memory.num_wanted_blocks
    num_missing_blocks = target - num_free_blocks - memory.num_returning_blocks
    victims = _victims(others, num_missing_blocks, memory.num_free_host_blocks)
    if victims:
        leaving = [each.request_id for each in victims]
        run = [each.request_id for each in batch if each.request_id not in leaving]
        return IterationPlan(run, swap_out=leaving)
    returning = _returning(due, others[:max_num_seqs], num_free_blocks, headroom, is_idle=not batch)
    swap_in = [each.request_id for each in returning]
    give_up: list[int] = []
    if may_give_up:
        num_needed_blocks = num_lacking_blocks + sum(each.num_blocks for each in returning)
        if order and order[0].place == "host" and order[0] not in returning:
            num_needed_blocks += order[0].num_blocks
        num_missing_blocks = num_needed_blocks - num_free_blocks - memory.num_returning_blocks
        give_up = [each.request_id for each in _last_on_device(others, num_missing_blocks)]
    run = [each.request_id for each in batch if each.request_id not in give_up]
    return IterationPlan(run, swap_in=swap_in, give_up=give_up)


def _num_due(order: Sequence[Footprint], num_blocks: int, max_num_seqs: int) -> int:
    """How many sequences from the front are due; at least one."""
    for rank, each in enumerate(order[:max_num_seqs]):
        num_blocks -= each.num_blocks + each.num_growth_blocks
        if num_blocks < 0 and rank > 0:
            return rank
    return min(len(order), max_num_seqs)


def _fill_batch(
    due: Sequence[Footprint], others: Sequence[Footprint], num_free_blocks: int, max_num_seqs: int, headroom: int
) -> list[Footprint]:
    batch: list[Footprint] = []
    for candidates, reserve in ((due, 0), (others, headroom)):
        for each in candidates:
            if len(batch) == max_num_seqs:
                return batch
            fits = each.num_growth_blocks == 0 or each.num_growth_blocks + reserve <= num_free_blocks
            if each.place == "device" and fits:
                num_free_blocks -= each.num_growth_blocks
                batch.append(each)
    return batch


def _victims(candidates: Sequence[Footprint], num_missing_blocks: int, num_free_host_blocks: int) -> list[Footprint]:
    """Sequences from the end up that together free `num_missing_blocks`, as far as the host pool takes them."""
    victims: list[Footprint] = []
    for each in reversed(candidates):
        if num_missing_blocks <= 0:
            break
        if each.place == "device" and each.num_blocks <= num_free_host_blocks:
            victims.append(each)
            num_missing_blocks -= each.num_blocks
            num_free_host_blocks -= each.num_blocks
    return victims


def _last_on_device(candidates: Sequence[Footprint], num_missing_blocks: int) -> list[Footprint]:
    """Sequences from the end up that together free `num_missing_blocks`."""
    given_up: list[Footprint] = []
    for each in reversed(candidates):
        if num_missing_blocks <= 0:
            break
        if each.place == "device":
            given_up.append(each)
            num_missing_blocks -= each.num_blocks
    return given_up


def _returning(
    due: Sequence[Footprint], others: Sequence[Footprint], num_free_blocks: int, headroom: int, *, is_idle: bool
) -> list[Footprint]:
    """Sequences on the host that fit the device, in order up to the first that does not."""
    returning: list[Footprint] = []
    for candidates, reserve in ((due, headroom), (others, 2 * headroom)):
        for each in candidates:
            if each.place != "host":
                continue
            may_use_headroom = is_idle and not returning  # without this one nothing would run
            if each.num_blocks + (0 if may_use_headroom else reserve) > num_free_blocks:
                return returning
            num_free_blocks -= each.num_blocks
            returning.append(each)
    return returning
