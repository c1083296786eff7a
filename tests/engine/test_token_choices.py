"""What a request says of single tokens: log-probabilities, logit_bias, bad_words, stop_token_ids."""

import torch
from checkpoints import make_tiny_llama
from test_model_runner import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    make_runner,
    make_sequences,
    random_prompts,
    run_ahead,
    run_whole,
)

from ensemble.cache.kv_pool import KVLayout, KVPool
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.engine import Engine
from ensemble.request import SamplingParams, TokenLogProbs

TOLERANCE = 1e-6  # transformers takes norms and angles in float32


def make_engine(path) -> Engine:
    runner = make_runner(path)
    spec = runner.model.spec
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim, torch.float64)
    pool = KVPool(layout, NUM_BLOCKS, torch.device("cpu"))
    runner.kv_pool = pool.tensor
    return Engine(spec, runner, pool)


def run_engine(engine: Engine, sequences) -> dict[int, list[TokenLogProbs]]:
    found = {sequence.request_id: [] for sequence in sequences}
    rows = [PrefillRow(sequence, 0, sequence.prompt_len) for sequence in sequences]
    batch = Batch(prefills=rows)
    while batch.prefills or batch.decodes:
        for sequence in engine.step(batch):
            found[sequence.request_id].append(sequence.last_log_probs)
        batch = Batch(decodes=[sequence for sequence in sequences if not sequence.is_finished])
    return found


def test_log_probs_are_those_of_transformers(tmp_path):
    """Of the model alone, whatever penalty, bias or temperature the token was drawn with."""
    from transformers import AutoModelForCausalLM

    path = make_tiny_llama(tmp_path)
    engine = make_engine(path)
    prompts = random_prompts(engine.spec.vocab_size)[:4]
    sampling = [
        SamplingParams(max_tokens=6, temperature=0, num_logprobs=3),
        SamplingParams(max_tokens=6, temperature=1.5, seed=3, repetition_penalty=1.7, num_logprobs=5),
        SamplingParams(max_tokens=6, temperature=0),
        SamplingParams(max_tokens=6, temperature=0, logit_bias={7: 50.0}, num_logprobs=0),
    ]
    sequences = make_sequences(prompts, sampling)
    found = run_engine(engine, sequences)
    assert found[2] == [None] * 6
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    for sequence in (sequences[0], sequences[1], sequences[3]):
        token_ids = sequence.request.prompt_token_ids + sequence.output_token_ids
        with torch.no_grad():
            logits = model(torch.tensor([token_ids]), use_cache=False).logits[0, sequence.prompt_len - 1 : -1]
        expected = logits.log_softmax(1)
        for position, (token_id, got) in enumerate(
            zip(sequence.output_token_ids, found[sequence.request_id], strict=True)
        ):
            row = expected[position]
            assert abs(got.log_prob - float(row[token_id])) < TOLERANCE
            assert got.rank == 1 + int((row > row[token_id]).sum())
            top = row.topk(sequence.sampling.num_logprobs)
            assert got.top_token_ids == top.indices.tolist()
            torch.testing.assert_close(torch.tensor(got.top_log_probs).double(), top.values, atol=TOLERANCE, rtol=0)
    assert sequences[3].output_token_ids == [7] * 6
    assert all(each.rank > 1 for each in found[3])


def test_bias_and_bad_words_also_in_steps_launched_ahead(tmp_path):
    runner = make_runner(make_tiny_llama(tmp_path))
    prompts = random_prompts(runner.model.spec.vocab_size)
    greedy = {"max_tokens": 10, "temperature": 0}
    free = make_sequences(prompts, [SamplingParams(**greedy)] * len(prompts))
    run_whole(runner, free)
    words = [tuple(sequence.output_token_ids[start:end]) for sequence, (start, end) in zip(free, CUTS, strict=True)]
    sampling = [SamplingParams(**greedy, bad_words=(word,)) for word in words[:5]]
    sampling.append(SamplingParams(**greedy, logit_bias={words[5][0]: -100.0, 9: -100.0}))
    limited = make_sequences(prompts, sampling)
    run_whole(runner, limited)
    for sequence, unlimited, word in zip(limited, free, words, strict=True):
        tokens, before = sequence.output_token_ids, unlimited.output_token_ids
        assert tokens != before
        assert not any(tuple(tokens[i : i + len(word)]) == word for i in range(len(tokens)))
    for seed in (1, 2):
        ahead = make_sequences(prompts, sampling, seed)
        run_ahead(runner, ahead, seed)
        assert [sequence.output_token_ids for sequence in ahead] == [sequence.output_token_ids for sequence in limited]


CUTS = ((0, 1), (2, 3), (1, 3), (2, 5), (4, 8), (3, 4))  # of each free output, what is forbidden


def test_a_stop_token_ends_the_sequence_but_not_before_min_tokens(tmp_path):
    runner = make_runner(make_tiny_llama(tmp_path))
    prompt = random_prompts(runner.model.spec.vocab_size)[4]
    free = make_sequences([prompt], [SamplingParams(max_tokens=10, temperature=0)])[0]
    run_whole(runner, [free])
    stop = free.output_token_ids[3]
    first = free.output_token_ids.index(stop)
    stopped = make_sequences([prompt], [SamplingParams(max_tokens=10, temperature=0, stop_token_ids=(stop,))])[0]
    run_whole(runner, [stopped])
    assert stopped.output_token_ids == free.output_token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    limits = SamplingParams(max_tokens=10, min_tokens=10, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
    late = make_sequences([prompt], [limits])[0]
    run_whole(runner, [late])
    assert len(late.output_token_ids) == 10
    assert stop not in late.output_token_ids
