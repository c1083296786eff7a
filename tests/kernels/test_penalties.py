import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kernels.penalties import apply_penalties, count_tokens, mask_tokens

VOCAB_SIZE = 1500
PROMPT, OUTPUT = [3, 700, 3, 1499], [700, 8, 8, 8, 1024]


@pytest.fixture
def state(device):
    """Tables of three states; state 2 has a prompt and output."""
    prompt_mask = torch.zeros(3, VOCAB_SIZE, dtype=torch.bool, device=device)
    prompt_mask[2, PROMPT] = True
    output_counts = torch.zeros(3, VOCAB_SIZE, dtype=torch.int32, device=device)
    output_counts[2] = torch.tensor(OUTPUT, device=device).bincount(minlength=VOCAB_SIZE)
    return prompt_mask, output_counts


def penalise(logits, state, repetition=1.0, presence=0.0, frequency=0.0):
    """Row 0 is in state 2, row 1 has no penalties."""
    columns = [torch.tensor([x, x], device=logits.device) for x in (repetition, presence, frequency)]
    apply_penalties(logits, torch.tensor([2, -1], device=logits.device), *state, *columns)


@pytest.fixture
def logits(dtype, device):
    torch.manual_seed(0)
    return (3 * torch.randn(2, VOCAB_SIZE)).to(dtype).to(device)


def tolerance(logits):
    return {"rtol": torch.finfo(logits.dtype).eps, "atol": 0, "check_dtype": False}


def test_repetition_penalty_is_that_of_transformers(logits, state):
    before = logits.clone()
    ids = torch.tensor([PROMPT + OUTPUT], device=logits.device)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, before[:1].float())
    penalise(logits, state, repetition=1.3)
    torch.testing.assert_close(logits[:1], expected, **tolerance(logits))
    assert torch.equal(logits[1], before[1])


def test_presence_and_frequency_count_output_tokens_alone(logits, state):
    expected = logits.float()
    for token_id in set(OUTPUT):
        expected[0, token_id] -= 0.5 + 0.25 * OUTPUT.count(token_id)
    penalise(logits, state, presence=0.5, frequency=0.25)
    torch.testing.assert_close(logits, expected, **(tolerance(logits) | {"atol": torch.finfo(logits.dtype).eps}))


def test_count_tokens(state):
    _, output_counts = state
    expected = output_counts.clone()
    expected[2, 8] += 1
    expected[0, 1499] += 1
    device = output_counts.device
    count_tokens(output_counts, torch.tensor([2, -1, 0], device=device), torch.tensor([8, 5, 1499], device=device))
    assert torch.equal(output_counts, expected)


def test_mask_tokens(logits):
    expected = logits.clone()
    expected[0, 7] = expected[1, 0] = expected[1, 1499] = -torch.inf
    rows, ids = torch.tensor([[0, 1, 1], [7, 0, 1499]], device=logits.device)
    mask_tokens(logits, rows, ids)
    assert torch.equal(logits, expected)
    mask_tokens(logits, rows[:0], ids[:0])
    assert torch.equal(logits, expected)
