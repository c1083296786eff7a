"""Copies blocks between two pools beside the engine: on a stream of its own on a GPU, on a thread on a CPU.

Copies of one copier run one after the other. A pool, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`,
lies on this device, on a peer's (a CUDA IPC mapping) or, page-locked, on the host.
"""

import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any, TypeAlias

import torch

from ensemble.errors import LinkBroken, TransferError
from kernels.block_copy import as_rows, copy_blocks

# (source, target), of the same shape but for the number of blocks: whole pools, or the same layers and heads of both
Pieces: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]

# Of the kernel: as many reach 0.94 of NVLink's rate and nearly PCIe's, and leave the other multiprocessors to the
# engine's steps: a step of LLaMA-2-7B beside pulls takes 1.07 to 1.09 times as long, with all programs 1.18 to 1.41.
NUM_PROGRAMS = 32
MIN_ROW_BYTES = 64 << 10  # of a part of a block that the copy engine takes, row by row
NUM_LOCAL_PROGRAMS = 128  # within the device it is over in some 50 us
NUM_CHEAP_RUNS = 8  # calls, which took the host 124 us; the kernel's launch, its ids included, 97 to 250 us

_PR_SET_TIMERSLACK, _CUDA_MEMCPY_DEFAULT = 29, 4


@dataclass(frozen=True, slots=True)
class Copy:
    is_done: Callable[[], bool]
    seconds: Callable[[], float]  # of the copy itself, once it is done; raises what the copy raised
    futures: "tuple[Future[float], ...]" = ()  # not before they are is it done; from then on it has to be looked at


def make_copier(device: torch.device, min_run_bytes: int, *, is_local: bool = False) -> "Copier":
    """Few pieces, and pieces of `min_run_bytes` and more on average, go by the copy engine, as far as there is one.

    is_local: parts of blocks are copied within the device alone, and shortly: by many programs, or few by torch.
    """
    return StreamCopier(device, min_run_bytes, is_local=is_local) if device.type == "cuda" else ThreadCopier()


def together(*copies: Copy) -> Copy:
    """Done when all are, after the longest of their times."""
    return Copy(
        lambda: all(copy.is_done() for copy in copies),
        lambda: longest(copy.seconds for copy in copies),
        tuple(future for copy in copies for future in copy.futures),
    )


def longest(times: Iterable[Callable[[], float]]) -> float:
    """Seconds. Raises what one of them does: LinkBroken, if one does, before what concerns that copy alone."""
    seconds, errors = [], []
    for each in times:
        try:
            seconds.append(each())
        except TransferError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: isinstance(error, LinkBroken))
    return max(seconds)


def wait_for_any(copies: list[Copy], timeout_s: float) -> None:
    """Returns when one is done, if there are any, or after `timeout_s`.

    Where futures tell, it looks at nothing meanwhile: the threads that copy have the interpreter.
    """
    deadline = time.monotonic() + timeout_s
    while copies and not any(copy.is_done() for copy in copies) and (left_s := deadline - time.monotonic()) > 0:
        pending = [next((future for future in copy.futures if not future.done()), None) for copy in copies]
        if None in pending:
            nap()
        else:
            wait([future for future in pending if future is not None], left_s, FIRST_COMPLETED)


def nap() -> None:
    """Between two looks at a copy: some 25 us. With the slack that Linux gives a thread's timers it would be 75."""
    _libc().prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))  # nanoseconds; of this thread
    time.sleep(20e-6)


@cache
def _libc() -> ctypes.PyDLL:
    return ctypes.PyDLL(None)


class ThreadCopier:
    """Torch releases the GIL while it copies. A step has ended when the engine returns: there are none to wait for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-copy")

    def start(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        source_ids: list[int],
        target_ids: list[int],
        *,
        after_steps: bool = False,
    ) -> Copy:
        """Starts target[target_ids] = source[source_ids]; `after_steps`: once the steps launched before have ended."""
        return self.start_pieces([(source, target)], source_ids, target_ids)

    def start_pieces(self, pieces: Pieces, source_ids: list[int], target_ids: list[int]) -> Copy:
        """Starts target[target_ids] = source[source_ids] of every piece."""
        return self.run(_copy_timed, pieces, source_ids, target_ids)

    def run(self, function: Callable[..., float], *arguments: Any) -> Copy:
        """Calls it, which returns seconds, after the copies that were started before."""
        future = self._thread.submit(function, *arguments)
        return Copy(future.done, future.result, (future,))


def _copy_timed(pieces: Pieces, source_ids: list[int], target_ids: list[int]) -> float:  # seconds
    start = time.perf_counter()
    from_ids, to_ids = (torch.tensor(ids, dtype=torch.int64) for ids in (source_ids, target_ids))
    for source, target in pieces:
        copy_blocks(source, target, from_ids, to_ids)
    return time.perf_counter() - start


class StreamCopier:
    """The copy engine leaves the multiprocessors to the engine's steps, but costs a call for each run of blocks that
    are in a row on both sides, or for each part of a block; where they are many and short, a kernel copies all in one
    launch.
    """

    def __init__(self, device: torch.device, min_run_bytes: int, *, is_local: bool = False) -> None:
        self._device, self._min_run_bytes, self._is_local = device, min_run_bytes, is_local
        self.stream = torch.cuda.Stream(device)

    def start(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        source_ids: list[int],
        target_ids: list[int],
        *,
        after_steps: bool = False,
    ) -> Copy:
        """Starts target[target_ids] = source[source_ids]; `after_steps`: once the steps launched before have ended."""
        if after_steps:
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
        return self.start_pieces([(source, target)], source_ids, target_ids)

    def start_pieces(self, pieces: Pieces, source_ids: list[int], target_ids: list[int]) -> Copy:
        """Starts target[target_ids] = source[source_ids] of every piece."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pools = [pool for piece in pieces for pool in piece]
        are_whole, are_contiguous = (all(pool[:n].is_contiguous() for pool in pools) for n in (2, 1))
        runs = list(runs_of(source_ids, target_ids)) if are_whole else list(zip(source_ids, target_ids, repeat(1)))
        num_bytes = len(source_ids) * sum(source[0].nbytes for source, _ in pieces)
        are_long = num_bytes >= self._min_run_bytes * len(runs) * len(pieces)
        num_programs = NUM_LOCAL_PROGRAMS if self._is_local else NUM_PROGRAMS
        are_few = len(runs) * len(pieces) <= NUM_CHEAP_RUNS
        stays = self._is_local and all(pool.is_cuda for pool in pools)
        with torch.cuda.stream(self.stream):
            if (are_contiguous and (are_long or are_few)) or (stays and are_few):
                began.record()
                for source, target in pieces:
                    copy_runs(source, target, runs)
            elif not stays and are_long and all(row_bytes(pool) >= MIN_ROW_BYTES for pool in pools):
                began.record()
                for source, target in pieces:
                    copy_parts(source, target, runs, self.stream)
            else:
                ids = torch.tensor([source_ids, target_ids]).pin_memory().to(self._device, non_blocking=True)
                began.record()
                for source, target in pieces:
                    copy_blocks(source, target, ids[0], ids[1], num_programs=num_programs)
            ended.record()
        return Copy(ended.query, lambda: began.elapsed_time(ended) / 1e3)


Copier: TypeAlias = StreamCopier | ThreadCopier


def copy_runs(source: torch.Tensor, target: torch.Tensor, runs: list[tuple[int, int, int]]) -> None:
    """By the copy engine, a call for each (first source block, first target block, length); parts of blocks by torch's
    kernel, on all multiprocessors.
    """
    if not (source[:1].is_contiguous() and target[:1].is_contiguous()):
        source, target = as_rows(source, target)  # of wide words
    for first, to, length in runs:
        target[to : to + length].copy_(source[first : first + length], non_blocking=True)


def copy_parts(
    source: torch.Tensor,  # [Ns, L, 2, H, ...], L layers and H heads of a larger pool
    target: torch.Tensor,  # [Nt, L, 2, H, ...]
    runs: list[tuple[int, int, int]],
    stream: torch.cuda.Stream,
) -> None:
    """By the copy engine, a call for each (source block, target block, 1): rows of a layer's keys or values."""
    num_rows, width = source.shape[1] * source.shape[2], row_bytes(source)
    for first, to, _ in runs:
        error = _cudart().cudaMemcpy2DAsync(
            target[to].data_ptr(),
            target.stride(2) * target.element_size(),
            source[first].data_ptr(),
            source.stride(2) * source.element_size(),
            width,
            num_rows,
            _CUDA_MEMCPY_DEFAULT,
            stream.cuda_stream,
        )
        if error:
            raise RuntimeError(f"cudaMemcpy2DAsync: error {error}")


def row_bytes(pool: torch.Tensor) -> int:
    """Of what a part of a block has in one run."""
    return pool[0, 0, 0].nbytes


@cache
def _cudart() -> ctypes.CDLL:
    """The library that torch has loaded."""
    library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cudaMemcpy2DAsync.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    library.cudaMemcpy2DAsync.restype = ctypes.c_int
    return library


def runs_of(source_ids: list[int], target_ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first source block, first target block, length) of the pieces in which both lists count up by one."""
    start = 0
    for index in range(1, len(source_ids) + 1):
        goes_on = index < len(source_ids) and (
            source_ids[index] == source_ids[index - 1] + 1 and target_ids[index] == target_ids[index - 1] + 1
        )
        if not goes_on:
            yield source_ids[start], target_ids[start], index - start
            start = index
