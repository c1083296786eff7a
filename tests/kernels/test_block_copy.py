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


@pytest.mark.parametrize("heads", [slice(0, 2), slice(1, 2), slice(2, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_some_heads_of_some_layers_between_pools_of_other_shapes(heads, dtype, device):
    source = torch.randn(5, 6, 2, 5, 4, 8, device=device).to(dtype)
    target = torch.zeros(7, 4, 2, 4, 4, 8, dtype=dtype, device=device)
    expected = target.clone()
    source_ids, target_ids = torch.tensor([4, 0, 2], device=device), torch.tensor([1, 6, 0], device=device)
    to_heads = slice(4 - (heads.stop - heads.start), 4)
    expected[target_ids, 1:4, :, to_heads] = source[source_ids, 2:5, :, heads]
    copy_blocks(source[:, 2:5, :, heads], target[:, 1:4, :, to_heads], source_ids, target_ids, num_programs=3)
    assert torch.equal(target, expected)


def test_heads_into_whole_blocks_and_out_of_them(device):
    """A packed buffer on one side."""
    pool = torch.randn(4, 3, 2, 4, 2, 3, device=device)
    packed = torch.zeros(2, 3, 2, 2, 2, 3, device=device)
    ids, places = torch.tensor([3, 1], device=device), torch.tensor([0, 1], device=device)
    copy_blocks(pool[:, :, :, 1:3], packed, ids, places)
    assert torch.equal(packed, pool[ids, :, :, 1:3])
    other = torch.zeros_like(pool)
    copy_blocks(packed, other[:, :, :, 1:3], places, ids)
    assert torch.equal(other[ids, :, :, 1:3], packed) and int((other != 0).sum()) == packed.numel()


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
