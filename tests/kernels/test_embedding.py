import torch
from oracle import check
from torch.nn import functional as F

from kernels.embedding import embed, embed_with_positions


def test_embed(dtype, device):
    weight = torch.randn(50, 1100, dtype=dtype, device=device)
    token_ids = torch.tensor([49, 0, 7, 7], device=device)
    assert torch.equal(embed(token_ids, weight), F.embedding(token_ids, weight))


def test_embed_with_positions(dtype, device):
    torch.manual_seed(0)
    weight = torch.randn(50, 1100, dtype=dtype, device=device)
    position_weight = torch.randn(34, 1100, dtype=dtype, device=device)
    token_ids = torch.tensor([49, 0, 7, 7], device=device)
    positions = torch.tensor([0, 1, 30, 31], device=device)

    def torch_embedding(weight, position_weight):
        return F.embedding(token_ids, weight) + F.embedding(positions + 2, position_weight)

    out = embed_with_positions(token_ids, weight, positions, position_weight, 2)
    check(out, torch_embedding, weight, position_weight)
