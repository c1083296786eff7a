"""What the tables keep from step to step is what counting all tokens anew would give, however sequences come and go."""

import random

import torch

from ensemble.engine.penalties import PenaltyTables
from ensemble.engine.sampler import sample_tokens, sampling_arrays, sampling_input
from ensemble.engine.staging import Staging
from ensemble.request import Request, SamplingParams, Sequence

VOCAB_SIZE = 50


def make_sequence(rng: random.Random, request_id: int) -> Sequence:
    kinds = [
        SamplingParams(temperature=0, repetition_penalty=1.7),
        SamplingParams(temperature=0, presence_penalty=0.9, frequency_penalty=0.4),
        SamplingParams(temperature=0, repetition_penalty=0.6, frequency_penalty=-0.3),
        SamplingParams(temperature=0),
    ]
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
    return Sequence(Request(request_id=request_id, prompt_token_ids=prompt, sampling=rng.choice(kinds)))


def expected_token(logits: torch.Tensor, sequence: Sequence, output_token_ids: list[int]) -> int:
    """By the definition of each penalty, token by token."""
    params, scores = sequence.sampling, logits.clone()
    for token in range(VOCAB_SIZE):
        count = output_token_ids.count(token)
        if count > 0 or token in sequence.request.prompt_token_ids:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return int(scores.argmax())


def test_steps_read_and_ahead_with_sequences_that_pause_leave_and_return_as_others():
    """More penalised sequences than rows of the tables, so that rows are taken away; some steps' tokens are unread."""
    rng, cpu = random.Random(0), torch.device("cpu")
    torch.manual_seed(0)
    tables = PenaltyTables(VOCAB_SIZE, cpu)
    sequences = [make_sequence(rng, index) for index in range(40)]
    sampled, unread = torch.empty(0, dtype=torch.int64), {}
    pending: list[tuple[Sequence, int]] = []
    batch: list[Sequence] = []
    for _ in range(120):
        if not batch or any(s not in sequences for s in batch) or rng.random() < 0.5:  # else the step before once more
            batch = rng.sample(sequences, rng.randint(1, 20))
        if rng.random() < 0.5:  # the tokens of the step before are read only after this one has been launched
            outputs = {s.request_id: list(s.output_token_ids) for s in batch}
            for sequence, token in pending:
                outputs.setdefault(sequence.request_id, []).append(token)
            arrays = sampling_arrays(batch, frozenset(), tables, unread)
            commit(pending)
        else:
            commit(pending)
            outputs = {s.request_id: list(s.output_token_ids) for s in batch}
            arrays = sampling_arrays(batch, frozenset(), tables, {})
        logits = torch.randn(len(batch), VOCAB_SIZE, dtype=torch.float64)
        expected = [expected_token(row, s, outputs[s.request_id]) for row, s in zip(logits, batch, strict=True)]
        inputs = sampling_input(Staging(cpu).to_device(arrays))
        sampled = sample_tokens(logits, inputs, tables, sampled)
        assert sampled.tolist() == expected
        pending = list(zip(batch, expected, strict=True))
        unread = {s.request_id: row for row, s in enumerate(batch)}
        if rng.random() < 0.3:  # another request under the same number, or the same one from another engine
            index = rng.randrange(len(sequences))
            gone = sequences[index]
            if gone.request_id not in unread:
                moved = Sequence(gone.request, list(gone.output_token_ids))
                sequences[index] = rng.choice([make_sequence(rng, gone.request_id), moved])


def commit(tokens: list[tuple[Sequence, int]]) -> None:
    for sequence, token in tokens:
        sequence.output_token_ids.append(token)


def test_a_steady_step_sends_one_token_of_each_row_and_no_prompt():
    """The host's part of a step does not grow with the prompts."""
    rng = random.Random(1)
    tables = PenaltyTables(VOCAB_SIZE, torch.device("cpu"))
    sequences = [make_sequence(rng, index) for index in range(30)]
    num_penalised = sum(sequence.sampling != SamplingParams(temperature=0) for sequence in sequences)
    for sequence in sequences:
        sequence.output_token_ids.append(1)
    assert {"new_rows", "penalties"} <= set(sampling_arrays(sequences, frozenset(), tables, {}))
    for unread in ({sequence.request_id: row for row, sequence in enumerate(sequences)}, {}):
        for sequence in sequences if not unread else []:
            sequence.output_token_ids += [2, 3]
        groups = sampling_arrays(sequences, frozenset(), tables, unread)
        assert set(groups) == {"new_tokens"}
        new = groups["new_tokens"]
        assert (new["token_ids"] >= 0).sum() == num_penalised
        assert [source for source in new["sources"] if source >= 0] == [
            unread[s.request_id] for s in sequences if unread and s.sampling != SamplingParams(temperature=0)
        ]
