"""The sum of all ranks' tensors, in one shot: every rank reads all the others' over NVLink and adds them up itself.

    x = x_0 + x_1 + ... + x_{n-1}, in float32 and in this order on every rank: the same bits everywhere

For few bytes, where a ring's or a tree's steps cost more than reading n - 1 tensors whole: a decode step's 32 x 5,120
in fp16 are 320 KiB. Every rank has a buffer, mapped by all the others:

    [2, NUM_PROGRAMS] blocks   what is to be added up, of two calls in turn
    [2, NUM_PROGRAMS] int64    arrivals: how many ranks have written their block, in all calls of that turn
    [NUM_PROGRAMS] int64       calls: how many there have been

Program i of a rank has block i of `x`, and meets the programs i of the other ranks alone:

    block to the own buffer --> arrivals[i] of every rank + 1 --> own arrivals[i] are all --> add up all ranks' blocks

Two turns are enough, without a second meeting at the end: a rank is never more than one call ahead of another. It
writes call k + 2's block where call k's was. By then it has seen all arrivals of call k + 1, and a rank arrives there
when its kernel of call k has ended: nobody still reads what is overwritten. And as a rank arrives in call k + 2 only
when it has seen this one's arrival in call k + 1, which follows the end of call k here, none is counted among those of
call k. Which programs take part depends on the size of `x` alone, which is the same on all ranks.

Counts are never reset; 64 bits are enough for ever. The calls are counted on the device, as the arguments of a kernel
in a CUDA graph do not change.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import TRITON_DTYPES

# Programs wait for others on other GPUs, so all are to run at once: 256 of 256 threads find room on 32 multiprocessors.
NUM_PROGRAMS = 256
_BLOCK_BYTES = 8192  # two loads of 16 bytes for each thread
_NUM_WARPS = 8
MAX_BYTES = NUM_PROGRAMS * _BLOCK_BYTES
BUFFER_BYTES = 2 * MAX_BYTES + 3 * NUM_PROGRAMS * 8


@triton.jit(debug=True)  # for the assertion; before 3.3 it is left out, and who waits is ended from outside
def _all_reduce_kernel(
    x,  # [n], becomes the sum
    n,
    buffers,  # [NUM_RANKS] int64: addresses of the ranks' buffers
    own,  # address of this rank's
    max_polls,
    NUM_RANKS: tl.constexpr,
    NUM_RANKS_PADDED: tl.constexpr,  # a power of two
    NUM_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Grid [cdiv(n, BLOCK)]. In int64 throughout: of narrower ones `debug` would check every sum for an overflow."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    ARRIVALS: tl.constexpr = 2 * NUM_PROGRAMS * BLOCK_BYTES
    CALLS: tl.constexpr = ARRIVALS + 2 * NUM_PROGRAMS * 8
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    offsets = program * BLOCK + columns
    inside = offsets < n
    values = tl.load(x + offsets, mask=inside)
    ranks = tl.arange(0, NUM_RANKS_PADDED)
    exists = ranks < NUM_RANKS
    addresses = tl.load(buffers + ranks, mask=exists, other=0)
    calls = (own + CALLS).to(tl.pointer_type(tl.int64)) + program
    call = tl.load(calls)
    cell = (call % 2) * NUM_PROGRAMS + program  # of the turn's

    block = tl.multiple_of((own + cell * BLOCK_BYTES).to(tl.pointer_type(DTYPE)), 16)
    tl.store(block + columns, values, mask=inside)
    tl.debug_barrier()  # the release of one thread publishes the stores of all
    arrivals = ARRIVALS + cell * 8
    tl.atomic_add((addresses + arrivals).to(tl.pointer_type(tl.int64)), 1, mask=exists, sem="release", scope="sys")
    due = (call // 2 + 1) * NUM_RANKS
    own_arrivals = (own + arrivals).to(tl.pointer_type(tl.int64))
    num_polls = tl.zeros([], tl.int64)
    while tl.atomic_add(own_arrivals, 0, sem="acquire", scope="sys") < due:
        tl.device_assert(num_polls < max_polls, "all-reduce: a rank has not come")
        num_polls += 1
    tl.debug_barrier()  # the acquire of one thread is that of all

    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(NUM_RANKS):
        address = tl.sum(tl.where(ranks == rank, addresses, 0)) + cell * BLOCK_BYTES
        block = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        # Not from the first-level cache, which may still have what was there two calls ago.
        total += tl.load(block + columns, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(x + offsets, total.to(DTYPE), mask=inside)
    tl.store(calls, call + 1)


def all_reduce(
    x: Tensor,  # contiguous, at most MAX_BYTES; fp16, bf16 or fp32
    buffers: Tensor,  # [num_ranks] int64: addresses here of the ranks' buffers, on multiples of 16
    own: int,  # the address of this rank's
    max_polls: int,  # about a microsecond each
) -> None:
    """Adds up the ranks' tensors, in place. All ranks make the same calls in the same order, on one stream each.

    A buffer has BUFFER_BYTES, which are zeros before the first call. If a rank has not come after `max_polls`, the
    kernel ends in a failed assertion, after which the process can compute no more on its GPU.
    """
    num_bytes = x.numel() * x.element_size()
    if x.dtype not in TRITON_DTYPES or not x.is_contiguous() or not 0 < num_bytes <= MAX_BYTES:
        raise ValueError(
            f"x = {list(x.shape)} {x.dtype}, strides {x.stride()}: 1 to {MAX_BYTES} bytes of contiguous"
            " float16, bfloat16 or float32 are allowed"
        )
    (num_ranks,) = buffers.shape
    block = _BLOCK_BYTES // x.element_size()
    _all_reduce_kernel[(triton.cdiv(x.numel(), block),)](
        x,
        x.numel(),
        buffers,
        own,
        max_polls,
        NUM_RANKS=num_ranks,
        NUM_RANKS_PADDED=triton.next_power_of_2(num_ranks),
        NUM_PROGRAMS=NUM_PROGRAMS,
        BLOCK=block,
        BLOCK_BYTES=_BLOCK_BYTES,
        num_warps=_NUM_WARPS,
    )
