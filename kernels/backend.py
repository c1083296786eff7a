"""Which implementation a launcher takes, decided per call: the Triton kernel or the torch reference."""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# True: CPU tensors take the Triton kernels too, in Triton's interpreter. The kernel tests set it; it needs
# TRITON_INTERPRET=1 in the environment before triton is first imported.
interpret = False


def uses_triton(x: Tensor) -> bool:
    """True if `x` is on a GPU (or the interpreter is on) and of a dtype the kernels compute in: fp16, bf16, fp32."""
    return (x.is_cuda or interpret) and x.dtype in TRITON_DTYPES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are accumulated: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def warps_per_row(block: int) -> int:
    """Warps of a program that holds a row of `block` elements in registers."""
    return min(max(block // 1024, 4), 16)
