"""How the outputs of two ways to run the same step are compared, in float32 on a GPU."""

from collections.abc import Sequence as Rows

from torch import Tensor

from ensemble.request import Sequence

NEAR_TIE = 1e-3  # between the two best log-probabilities: rounding may choose there


def assert_same_step(
    logits: Tensor,  # [S, V]
    token_ids: Rows[int],
    expected_logits: Tensor,  # [S, V]
    expected_token_ids: Rows[int],
    sequences: list[Sequence],  # the S rows
) -> None:
    """Every row's log-probabilities agree, and greedy rows' tokens but for near ties."""
    log_probs, expected = logits.double().log_softmax(1), expected_logits.double().log_softmax(1)
    assert (log_probs - expected).abs().max() < NEAR_TIE
    best, second = expected.topk(2).values.unbind(1)
    for row, sequence in enumerate(sequences):
        is_greedy = sequence.sampling.temperature == 0 and sequence.sampling.repetition_penalty == 1
        if is_greedy and best[row] - second[row] > NEAR_TIE:
            assert token_ids[row] == expected_token_ids[row]
