import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kernels.penalties import apply_penalties, mask_tokens

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


def penalise(logits, state, repetition=1.0, presence=0.0, frequency=0.0, new=(-1, -1), sources=(-1, -1), before=None):
    """Row 0 is in state 2, row 1 has no penalties."""
    device = logits.device
    columns = [torch.tensor([x, x], device=device) for x in (repetition, presence, frequency)]
    state_ids, new, sources = (torch.tensor(ids, device=device) for ids in ([2, -1], new, sources))
    apply_penalties(logits, state_ids, *state, new, sources, before, *columns)


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


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("token_id", [0, 8, 1023, 1024, 1499])
def test_a_new_token_is_counted_once_and_penalised(logits, state, token_id, is_read):
    expected, expected_counts = logits.float(), state[1].clone()
    expected_counts[2, token_id] += 1
    expected[0] -= 0.25 * expected_counts[2]
    if is_read:
        penalise(logits, state, frequency=0.25, new=(token_id, 5))
    else:
        before = torch.tensor([6, 9, token_id], device=logits.device)
        penalise(logits, state, frequency=0.25, new=(7, -1), sources=(2, 1), before=before)
    assert torch.equal(state[1], expected_counts)
    torch.testing.assert_close(logits, expected, **(tolerance(logits) | {"atol": torch.finfo(logits.dtype).eps}))


def test_mask_tokens(logits):
    expected = logits.clone()
    expected[0, 7] = expected[1, 0] = expected[1, 1499] = -torch.inf
    rows, ids = torch.tensor([[0, 1, 1], [7, 0, 1499]], device=logits.device)
    mask_tokens(logits, rows, ids)
    assert torch.equal(logits, expected)
    mask_tokens(logits, rows[:0], ids[:0])
    assert torch.equal(logits, expected)
