"""Which implementation a launcher takes, decided per call: the Triton kernel or the torch reference."""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

interpret = False  # True: CPU tensors run the Triton kernels too, in Triton's interpreter. Set by the kernel tests


def uses_triton(x: Tensor) -> bool:
    """True if `x` is on a GPU (or the interpreter is on) and of a dtype the kernels compute in: fp16, bf16, fp32."""
    return (x.is_cuda or interpret) and x.dtype in TRITON_DTYPES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are accumulated: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
