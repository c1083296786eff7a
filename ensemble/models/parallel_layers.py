"""Layers divided among the ranks of a group. On a rank that is alone they are the plain ones."""

from torch import Tensor

from ensemble.models.layers import Empty, Linear, Weight
from ensemble.parallel.shares import share, shares
from ensemble.parallel.tensor_parallel import TensorParallel
from kernels.embedding import embed


class RowParallelLinear(Linear):
    """Each rank multiplies with its columns, of an input of which it has those; the products are added up.

    The bias is the first rank's.
    """

    def __init__(
        self, in_size: int, columns: range, out_size: int, has_bias: bool, parallel: TensorParallel, empty: Empty
    ) -> None:
        super().__init__(in_size, [out_size], has_bias and parallel.rank == 0, empty, columns=columns)
        self._parallel = parallel

    def __call__(self, x: Tensor) -> Tensor:
        return self._parallel.all_reduce(super().__call__(x))


class VocabularyEmbedding:
    """Each rank has the rows of some tokens; those of the others are zero to it, and the sum is the embedding."""

    def __init__(self, vocab_size: int, width: int, parallel: TensorParallel, empty: Empty) -> None:
        self.shape = (vocab_size, width)
        self.tokens = share(vocab_size, parallel)
        self.weight = empty(len(self.tokens), width)
        self._parallel = parallel

    def __call__(
        self,
        token_ids: Tensor,  # [T] int64
    ) -> Tensor:  # [T, width]
        if self._parallel.size == 1:
            return embed(token_ids, self.weight)
        rows = token_ids - self.tokens.start
        is_mine = (rows >= 0) & (rows < len(self.tokens))
        x = embed(rows.where(is_mine, 0), self.weight)
        return self._parallel.all_reduce(x.masked_fill_(~is_mine[:, None], 0))

    def named_weight(self, name: str) -> Weight:
        return Weight(f"{name}.weight", self.weight, self.shape, (self.tokens.start, 0))


class VocabularyHead(Linear):
    """Each rank computes the logits of its tokens; every rank gets all of them, and so samples the same tokens.

    Tied, its weight is the embedding's.
    """

    def __init__(
        self, in_size: int, vocab_size: int, parallel: TensorParallel, empty: Empty, tied: VocabularyEmbedding | None
    ) -> None:
        self._widths = [len(tokens) for tokens in shares(vocab_size, parallel.size)]
        weight = None if tied is None else tied.weight
        super().__init__(in_size, [vocab_size], False, empty, weight, rows=[[share(vocab_size, parallel)]])
        self._parallel = parallel

    def __call__(self, x: Tensor) -> Tensor:
        return self._parallel.all_gather(super().__call__(x), self._widths)
