import pytest
import torch

from kernels.host_copy import host_copy


def on_host(tensor, device):
    return tensor.pin_memory() if device == "cuda" else tensor


@pytest.mark.parametrize("num_words", [1, 3, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_there_and_back_and_not_a_word_more(num_words, dtype, device):
    length = num_words * 4 // dtype.itemsize if dtype is not torch.int64 else num_words
    source = on_host(torch.randint(0, 100, (length,), dtype=dtype), device)
    there = torch.full((length + 8,), 7, dtype=dtype, device=device)
    host_copy(source, there[:length])
    assert torch.equal(there[:length].cpu(), source) and (there[length:] == 7).all()
    back = on_host(torch.full((length + 8,), 9, dtype=dtype), device)
    host_copy(there[:length], back[:length])
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(back[:length], source) and (back[length:] == 9).all()
