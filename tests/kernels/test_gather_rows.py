import pytest
import torch

from kernels.gather_rows import gather_rows


def test_rows_come_in_the_order_asked_for(dtype, device):
    x = torch.randn(9, 2200, dtype=dtype, device=device)[:, :1100]
    row_ids = torch.tensor([8, 0, 3, 3], device=device)
    assert torch.equal(gather_rows(x, row_ids), x[row_ids])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.zeros(2**20 + 8, 2048, dtype=torch.float16, device=device)
    row_ids = torch.tensor([2**20 + 7, 1], device=device)
    x[row_ids] = torch.randn(2, 2048, dtype=torch.float16, device=device)
    assert torch.equal(gather_rows(x, row_ids), x[row_ids])
