import pytest
import torch

from kernels.block_copy import copy_blocks


@pytest.mark.parametrize("shape", [(3, 2, 2, 16, 64), (2, 2, 3, 16, 80), (7,), (20000,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_blocks_arrive_where_they_are_sent_and_nowhere_else(shape, dtype, device):
    torch.manual_seed(0)
    source = (100 * torch.rand(6, *shape)).to(dtype).to(device)
    target = torch.zeros(9, *shape, dtype=dtype, device=device)
    source_ids = torch.tensor([5, 0, 3], device=device)
    target_ids = torch.tensor([2, 8, 0], device=device)
    expected = target.clone()
    expected[target_ids] = source[source_ids]
    copy_blocks(source, target, source_ids, target_ids)
    assert torch.equal(target, expected)


def test_a_range_of_layers(device):
    source = torch.randn(4, 6, 2, 2, 16, 8, device=device)
    target = torch.zeros(4, 3, 2, 2, 16, 8, device=device)
    ids = torch.tensor([3, 1], device=device)
    copy_blocks(source[:, 2:5], target, ids, ids)
    assert torch.equal(target[ids], source[ids, 2:5])


@pytest.mark.gpu
def test_to_pinned_host_memory_and_back():
    pool = torch.randn(8, 2, 2, 4, 16, 64, device="cuda")
    host = torch.zeros(8, 2, 2, 4, 16, 64, pin_memory=True)
    blocks, places = torch.tensor([6, 1], device="cuda"), torch.tensor([0, 5], device="cuda")
    expected = pool[blocks].clone()
    copy_blocks(pool, host, blocks, places)
    torch.cuda.synchronize()
    assert torch.equal(host[[0, 5]], expected.cpu())
    pool[blocks] = 0
    copy_blocks(host, pool, places, blocks)
    assert torch.equal(pool[blocks], expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_gpu_memory")
def test_more_than_2_31_elements():
    source = torch.zeros(2**12 + 2, 2**19 + 1, dtype=torch.int8, device="cuda")  # odd rows are copied byte by byte
    source[-1] = torch.arange(2**19 + 1, device="cuda")
    target = torch.zeros(2, 2**19 + 1, dtype=torch.int8, device="cuda")
    copy_blocks(source, target, torch.tensor([2**12 + 1], device="cuda"), torch.tensor([1], device="cuda"))
    assert torch.equal(target[1], source[-1])


@pytest.mark.parametrize("num_programs", [1, 2, 7, 1000])
def test_few_programs_copy_everything(num_programs, device):
    source = torch.randn(5, 30000, device=device)  # four chunks a block
    target = torch.zeros(4, 30000, device=device)
    source_ids, target_ids = torch.tensor([4, 0, 2], device=device), torch.tensor([1, 3, 0], device=device)
    copy_blocks(source, target, source_ids, target_ids, num_programs)
    assert torch.equal(target[target_ids], source[source_ids])
    assert not target[2].any()
