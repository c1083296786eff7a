"""How kernel outputs are compared, and inputs that several kernels' tests need."""

from collections.abc import Callable

import torch
from torch import Tensor


def check(out: Tensor, function: Callable[..., Tensor], *args: object) -> None:
    """Holds `out` against `function(*args)` in float64.

    Its root mean square error may be twice that of torch computing the function in the dtype of `out`, plus one unit
    in the last place of the output's scale. No element may be off by more than four times torch's worst plus a unit:
    the worst of few elements is a matter of luck, the mean is not.
    """
    exact = function(*[_wide(arg) for arg in args])
    error = (out.double() - exact).abs()
    rounding = (function(*args).double() - exact).abs()
    assert out.shape == exact.shape
    assert not torch.isnan(out).any()
    unit = torch.finfo(out.dtype).eps
    assert _rms(error) <= 2 * _rms(rounding) + unit * _rms(exact)
    assert error.max() <= 4 * rounding.max() + unit * exact.abs().max()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _wide(arg: object) -> object:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


class PagedCache:
    """One layer's view of a pool, filled with random sequences in shuffled blocks; all else in the pool is NaN."""

    def __init__(
        self, lens: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: str
    ) -> None:
        counts = [-(-n // block_size) for n in lens]
        num_blocks = sum(counts) + 2
        pool = torch.full((num_blocks, 2, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
        free = torch.randperm(num_blocks).tolist()
        tables = torch.full((len(lens), max(counts) + 1), 2**31 - 1, dtype=torch.int32)  # never to be read
        self.keys, self.values = [], []
        for seq, (length, count) in enumerate(zip(lens, counts, strict=True)):
            tables[seq, :count] = torch.tensor([free.pop() for _ in range(count)])
            pair = torch.randn(2, length, num_kv_heads, head_dim, dtype=dtype)
            positions = torch.arange(length)
            blocks, offsets = tables[seq][positions // block_size].long(), positions % block_size
            pool[:, 1].transpose(2, 3)[blocks, :, offsets] = pair.transpose(0, 1)
            self.keys.append(pair[0].to(device))
            self.values.append(pair[1].to(device))
        self.kv_cache = pool.to(device)[:, 1]
        self.block_tables = tables.to(device)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of one sequence's last len(q) tokens, q [L, Hq, D], k and v [C, Hkv, D]: torch SDPA.

    window: how many tokens each sees, its own included.
    """
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    if window is not None:
        mask = mask.triu(len(k) - len(q) - window + 1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)
