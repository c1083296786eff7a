"""Small copies between page-locked host memory and the device, by a kernel that reaches over to the host.

The copy engines do one copy after the other: a step's inputs would wait behind whatever swap is under way, 0.6 ms for a
block of 32 MiB. A kernel's reads and writes share the bus with it instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_words"])
def _copy_words_kernel(
    source,  # [num_words] int32
    target,  # [num_words] int32
    num_words,
    BLOCK: tl.constexpr,
):
    """Grid [cdiv(num_words, BLOCK)]."""
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = words < num_words
    tl.store(target + words, tl.load(source + words, mask=inside), mask=inside)


def host_copy_reference(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def host_copy(
    source: Tensor,  # contiguous; its bytes a multiple of 4
    target: Tensor,  # as many bytes of the same dtype, contiguous
) -> None:
    """target[:] = source, on the current stream of the device that one of them is on; the other is page-locked.

    The caller keeps the host's side alive until the copy has run: torch does not know that a kernel uses it.
    """
    if not (source.is_cuda or target.is_cuda or backend.interpret):
        host_copy_reference(source, target)
        return
    source_words, target_words = (each.view(-1).view(torch.int32) for each in (source, target))
    num_words = source_words.shape[0]
    _copy_words_kernel[(triton.cdiv(num_words, _BLOCK),)](source_words, target_words, num_words, BLOCK=_BLOCK)
