import pytest
import torch

from kernels.gumbel_noise import philox_reference
from kernels.sampling import greedy, sample, sample_reference

VOCAB_SIZE = 1000


@pytest.fixture
def new_logits(dtype, device):
    def draw(num_rows, vocab_size=VOCAB_SIZE, scale=2.0):
        torch.manual_seed(0)
        return (scale * torch.randn(num_rows, vocab_size)).to(dtype).to(device)

    return draw


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None, sampler=sample):
    num_rows, device = len(logits), logits.device

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype, device=device).expand(num_rows).contiguous()

    return sampler(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.arange(num_rows, device=device) if seeds is None else column(seeds, torch.int64),
        column(0 if positions is None else positions, torch.int64),
    )


def kept_by_sorting(logits, temperature, top_k, top_p, min_p):
    """Masks of the kept tokens by vLLM's recipe: min-p, then top-k, then top-p of what is left, by sorting."""
    scaled = logits.double().cpu() / temperature
    scaled[scaled.softmax(1) < min_p * scaled.softmax(1).amax(1, keepdim=True)] = -torch.inf
    if top_k:
        scaled[scaled < scaled.topk(top_k).values[:, -1:]] = -torch.inf
    ascending, _ = scaled.sort(dim=1, stable=True)
    dropped = ascending.softmax(1).cumsum(1) <= 1 - top_p
    dropped[:, -1] = False
    smallest = ascending.masked_fill(dropped, torch.inf).amin(1, keepdim=True)
    return scaled.isfinite() & (scaled >= smallest)


def test_philox_gives_the_published_vector():
    words = philox_reference(torch.tensor([0]), torch.tensor([0]), 4)[0]
    assert [f"{word:08x}" for word in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_greedy_takes_the_first_of_the_largest(new_logits):
    logits = new_logits(4)
    logits[1, [700, 20, 999]] = 50.0
    expected = logits.cpu().argmax(1)
    expected[1] = 20
    assert torch.equal(greedy(logits).cpu(), expected)
    assert torch.equal(draw(logits, temperature=0.0).cpu(), expected)


def test_vocabulary_larger_than_a_tile(new_logits):
    logits = new_logits(2, vocab_size=20_001)
    logits[0, 20_000] = 30.0
    assert torch.equal(greedy(logits).cpu(), logits.cpu().argmax(1))
    assert torch.equal(draw(logits), draw(logits, sampler=sample_reference))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 20, "temperature": 1.7},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    ],
    ids=str,
)
def test_kernel_and_reference_draw_the_same_kept_tokens(options, new_logits):
    logits = new_logits(6)
    token_ids = draw(logits, **options)
    assert torch.equal(token_ids, draw(logits, sampler=sample_reference, **options))
    rules = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    kept = kept_by_sorting(logits, **rules)
    assert kept[torch.arange(6), token_ids.cpu()].all()


def test_rules_differ_by_row(new_logits):
    logits = new_logits(4)
    rows = {
        "temperature": [0.0, 1.0, 0.5, 2.0],
        "top_k": [0, 5, 0, 900],
        "top_p": [0.5, 1.0, 0.9, 0.99],
        "min_p": [0.0, 0.0, 0.05, 0.0],
    }
    together = draw(logits, **rows, seeds=[3, -4, 5, 2**62], positions=[1, 2, 3, 2**33])
    assert torch.equal(
        together, draw(logits, **rows, seeds=[3, -4, 5, 2**62], positions=[1, 2, 3, 2**33], sampler=sample_reference)
    )
    order = [2, 0, 3, 1]
    permuted = {name: [values[i] for i in order] for name, values in rows.items()}
    moved = draw(logits[order], **permuted, seeds=[5, 3, 2**62, -4], positions=[3, 1, 2**33, 2])
    assert torch.equal(moved, together[order])


def test_tied_logits_are_kept_or_dropped_together(device):
    logits = torch.full((200, 64), -30.0, device=device)
    logits[:, [3, 10, 40]] = 1.0
    logits[:, 7] = 2.0
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        for sampler in (sample, sample_reference) if device == "cuda" else (sample_reference,):
            token_ids = draw(logits, sampler=sampler, **options)
            assert set(token_ids.tolist()) == {3, 7, 10, 40}


def test_frequencies_follow_the_probabilities():
    """Chi-square of 20,000 draws over 8 tokens; the 99.9 % point of 7 degrees of freedom is 24.3."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -3.0, 0.2]).expand(20_000, -1).contiguous()
    counts = draw(logits, positions=7, sampler=sample_reference).bincount(minlength=8)
    expected = 20_000 * logits[0].double().softmax(0)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.gpu
def test_frequencies_follow_the_probabilities_over_a_large_vocabulary(device):
    """The same of the compiled kernel: 32,000 tokens in 64 classes, 100,000 draws; 99.9 % point of 63 is 103.4."""
    torch.manual_seed(0)
    logits = torch.randn(32_000, device=device)
    counts = torch.zeros(64, dtype=torch.int64, device=device)
    for batch in range(100):
        rows = logits.expand(1000, -1)
        counts += (draw(rows, seeds=batch, positions=torch.arange(1000, device=device)) % 64).bincount(minlength=64)
    expected = 100_000 * logits.double().softmax(0).view(-1, 64).sum(0)
    assert ((counts - expected) ** 2 / expected).sum() < 103.4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.8, "min_p": 0.001}])
def test_kernel_and_reference_agree_over_a_large_vocabulary(options, new_logits):
    logits = new_logits(128, vocab_size=50_272)
    token_ids = draw(logits, **options)
    same = token_ids == draw(logits, sampler=sample_reference, **options)
    assert same.float().mean() > 0.99  # a draw may differ where the mass sums to top_p up to rounding
    assert torch.equal(token_ids, draw(logits, **options))
