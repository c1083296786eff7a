import pytest
import torch
from oracle import check

from kernels.log_probs import log_probs


@pytest.mark.parametrize("vocab_size", [100, 9000])
def test_chosen_and_likeliest_tokens(vocab_size, dtype, device):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, vocab_size)).to(dtype).to(device)
    token_ids = torch.tensor([vocab_size - 1, 0, 50], device=device)
    chosen, ranks, top_token_ids, top_log_probs = log_probs(logits, token_ids, 5)
    ordered = logits.double().sort(dim=1, descending=True, stable=True).indices.tolist()
    values = logits.double().tolist()
    for row, token_id in enumerate(token_ids.tolist()):
        assert int(ranks[row]) == 1 + sum(value > values[row][token_id] for value in values[row])
        assert top_token_ids[row].tolist() == ordered[row][:5]
    check(chosen, lambda x: x.log_softmax(1).gather(1, token_ids[:, None])[:, 0], logits.float())
    check(top_log_probs, lambda x: x.log_softmax(1).topk(5).values, logits.float())
    check(top_log_probs, lambda x: x.log_softmax(1).gather(1, top_token_ids), logits.float())
    assert all(len(set(row)) == 5 for row in top_token_ids.tolist())


def test_ties_go_by_token_id_and_masked_logits_come_last(device):
    logits = torch.full((1, 6), -torch.inf, device=device)
    logits[0, [4, 1, 3]] = torch.tensor([1.0, 2.0, 1.0], device=device)
    _, ranks, top_token_ids, top_log_probs = log_probs(logits, torch.tensor([1], device=device), 5)
    assert top_token_ids.tolist() == [[1, 3, 4, 0, 2]]
    assert ranks.tolist() == [1]
    assert top_log_probs[0, 3:].isneginf().all()


def test_no_likeliest_tokens(device):
    logits = torch.randn(2, 50, device=device)
    chosen, ranks, top_token_ids, top_log_probs = log_probs(logits, torch.tensor([3, 4], device=device), 0)
    torch.testing.assert_close(chosen, logits.log_softmax(1)[[0, 1], [3, 4]])
    assert ranks.shape == (2,)
    assert top_token_ids.shape == top_log_probs.shape == (2, 0)
