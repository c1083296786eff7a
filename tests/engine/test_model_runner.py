"""The runner against transformers, in float64: the same greedy tokens however the work is cut into steps."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_tiny_llama, make_tiny_mistral, make_tiny_opt, make_tiny_qwen2, make_tiny_qwen3

from ensemble.config import ModelConfig
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.model_runner import ModelRunner, load_model, resolve_dtype
from ensemble.models import layers
from ensemble.models.spec import load_model_spec
from ensemble.request import Request, SamplingParams, Sequence

BLOCK_SIZE = 8
NUM_BLOCKS = 128
PROMPT_LENS = (1, 7, 8, 9, 40, 23)
NUM_OUTPUT_TOKENS = 12

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS = {
    "llama-gqa": (make_tiny_llama, {}),
    "llama-mha": (make_tiny_llama, {"num_key_value_heads": 4}),
    "llama-mqa-3-heads": (make_tiny_llama, {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-tied": (make_tiny_llama, {"tie_word_embeddings": True}),
    "llama-biases": (make_tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (make_tiny_llama, {"head_dim": 32, "rms_norm_eps": 1e-2}),
    "llama-rope-theta": (make_tiny_llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "llama-rope-linear": (
        make_tiny_llama,
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama-rope-llama3": (make_tiny_llama, {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-yarn": (
        make_tiny_llama,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 32},
    ),
    "mistral": (make_tiny_mistral, {"head_dim": 32}),
    "mistral-window": (make_tiny_mistral, {"sliding_window": 10}),
    "mistral-window-of-some-layers": (
        make_tiny_mistral,
        {"sliding_window": 10, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen2": (make_tiny_qwen2, {}),
    "qwen2-tied": (make_tiny_qwen2, {"tie_word_embeddings": True}),
    "qwen2-window": (make_tiny_qwen2, {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "qwen3": (make_tiny_qwen3, {}),
    "qwen3-biases-window": (
        make_tiny_qwen3,
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0},
    ),
    "opt": (make_tiny_opt, {}),
    "opt-gelu-no-bias": (make_tiny_opt, {"activation_function": "gelu", "enable_bias": False}),
    "opt-untied": (make_tiny_opt, {"tie_word_embeddings": False}),
    "opt-350m": (make_tiny_opt, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models: several threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Path:
    make, overrides = CHECKPOINTS[request.param]
    return make(tmp_path_factory.mktemp(request.param), **overrides)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def make_runner(
    path: Path, device: str = "cpu", dtype: str = "float64", max_model_len: int | None = None
) -> ModelRunner:
    """Over a pool of NaN, so that reading a slot that was not written shows."""
    spec = load_model_spec(path)
    config = ModelConfig(path=path, dtype=dtype, max_model_len=max_model_len)
    device = torch.device(device)
    dtype = resolve_dtype(config, spec, device)
    pool_shape = (NUM_BLOCKS, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    kv_pool = torch.full(pool_shape, torch.nan, dtype=dtype, device=device)
    return ModelRunner(load_model(spec, config, device, dtype), kv_pool, BLOCK_SIZE)


def make_sequences(prompts: list[list[int]], sampling: list[SamplingParams], seed: int = 0) -> list[Sequence]:
    """Sequences with blocks for their whole length, shuffled over the pool."""
    free = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(free)
    sequences = []
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        request = Request(request_id=index, prompt_token_ids=prompt, sampling=params)
        num_blocks = -(-request.max_num_kv_tokens // BLOCK_SIZE)
        sequences.append(Sequence(request, block_ids=[free.pop() for _ in range(num_blocks)]))
    return sequences


def run_step(runner: ModelRunner, batch: Batch) -> None:
    token_ids = runner.run(batch)
    for row in batch.prefills:
        row.sequence.num_computed_tokens = row.end
    for sequence in batch.decodes:
        sequence.num_computed_tokens += 1
    for sequence, token_id in zip(batch.sampled, token_ids, strict=True):
        sequence.append(token_id, frozenset())


def run_at_random(runner: ModelRunner, sequences: list[Sequence], seed: int) -> None:
    """Prompts cut at random, chunks and decode rows mixed at random, until every sequence is finished."""
    rng = random.Random(seed)
    while unfinished := [sequence for sequence in sequences if not sequence.is_finished]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        prefills = []
        for sequence in chosen:
            if sequence.num_computed_tokens < sequence.prompt_len:
                start = sequence.num_computed_tokens
                prefills.append(PrefillRow(sequence, start, rng.randint(1, sequence.prompt_len - start)))
        run_step(
            runner,
            Batch(prefills, [sequence for sequence in chosen if sequence.num_computed_tokens >= sequence.prompt_len]),
        )


def run_whole(runner: ModelRunner, sequences: list[Sequence]) -> None:
    """All prompts in one step, then all sequences decode together."""
    run_step(runner, Batch(prefills=[PrefillRow(sequence, 0, sequence.prompt_len) for sequence in sequences]))
    while unfinished := [sequence for sequence in sequences if not sequence.is_finished]:
        run_step(runner, Batch(decodes=unfinished))


def random_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in PROMPT_LENS]


def transformers_greedy(path: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    outputs = []
    for prompt in prompts:
        token_ids = list(prompt)
        for _ in range(num_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([token_ids]), use_cache=False).logits
            token_ids.append(int(logits[0, -1].argmax()))
        outputs.append(token_ids[len(prompt) :])
    return outputs


def test_greedy_tokens_are_those_of_transformers(checkpoint):
    runner = make_runner(checkpoint)
    prompts = random_prompts(runner.model.spec.vocab_size)
    sampling = [SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0)] * len(prompts)
    expected = transformers_greedy(checkpoint, prompts, NUM_OUTPUT_TOKENS)
    assert len({token for output in expected for token in output}) >= 8, "the oracle repeats itself: a weak test"

    whole = make_sequences(prompts, sampling)
    run_whole(runner, whole)
    assert [sequence.output_token_ids for sequence in whole] == expected

    for seed in (1, 2):
        mixed = make_sequences(prompts, sampling, seed)
        run_at_random(runner, mixed, seed)
        assert [sequence.output_token_ids for sequence in mixed] == expected


def test_dynamic_rope_scaling_is_that_of_transformers_generate(tmp_path):
    """From prompts within the original length to answers beyond it. A new model for each: it remembers the longest."""
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    path = make_tiny_llama(tmp_path, rope_parameters=rope, max_position_embeddings=40)
    runner = make_runner(path)
    prompts = random_prompts(runner.model.spec.vocab_size)[3:]
    expected = []
    for prompt in prompts:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        limits = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
        outputs = model.generate(torch.tensor([prompt]), **limits)
        expected.append(outputs[0, len(prompt) :].tolist())
    runner.model.spec = replace(runner.model.spec, eos_token_ids=frozenset([1]))
    sequences = make_sequences(prompts, [SamplingParams(max_tokens=40, min_tokens=40, temperature=0)] * len(prompts))
    run_at_random(runner, sequences, seed=1)
    assert [sequence.output_token_ids for sequence in sequences] == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-mqa-3-heads", "mistral-window", "qwen2", "qwen3-biases-window", "opt", "opt-350m"]
)
def test_greedy_tokens_on_a_gpu_are_those_of_transformers(tmp_path, name):
    """In float32, to the first token where the two best are closer than 1e-3: rounding may choose there."""
    make, overrides = CHECKPOINTS[name]
    path = make(tmp_path, **overrides)
    assert_certain_tokens(path, make_runner(path, device="cuda:0", dtype="float32"))


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "opt"])
def test_weights_in_the_order_of_onednn_give_the_tokens_of_transformers(tmp_path, name, monkeypatch):
    monkeypatch.setattr(layers, "MIN_PACKED", 0)  # else those of a tiny model stay as they are
    make, overrides = CHECKPOINTS[name]
    path = make(tmp_path, **overrides)
    runner = make_runner(path, dtype="float32")
    assert all(linear.weight.is_mkldnn for linear in runner.model.linears())
    assert_certain_tokens(path, runner)


def assert_certain_tokens(path: Path, runner: ModelRunner) -> None:
    prompts = random_prompts(runner.model.spec.vocab_size)
    expected = transformers_greedy(path, prompts, NUM_OUTPUT_TOKENS)
    certain = [certain_length(path, prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    assert sum(certain) > NUM_OUTPUT_TOKENS * len(prompts) / 2
    for seed in (1, 2):
        sequences = make_sequences(prompts, [SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0)] * 6, seed)
        run_at_random(runner, sequences, seed)
        for sequence, tokens, length in zip(sequences, expected, certain, strict=True):
            assert sequence.output_token_ids[:length] == tokens[:length]


def certain_length(path: Path, prompt: list[int], output: list[int]) -> int:
    """Tokens of the oracle's output before the first whose lead over the next best is below 1e-3."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + output]), use_cache=False).logits[0].log_softmax(-1)
    best, second = log_probs[len(prompt) - 1 : -1].topk(2).values.unbind(1)
    close = (best - second < 1e-3).nonzero()
    return int(close[0]) if len(close) else len(output)


def test_seeded_samples_depend_on_the_request_alone(llama):
    """Alone or in any mix with others, greedy rows among them, a seeded request gets the same tokens."""
    runner = make_runner(llama)
    prompts = [random_prompts(runner.model.spec.vocab_size)[4]] * 4
    drawn = {"max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    sampling = [
        SamplingParams(**drawn, seed=1),
        SamplingParams(**drawn, seed=2**64 - 1),
        SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0),
        SamplingParams(**drawn, seed=1),
    ]
    alone = make_sequences(prompts, sampling)
    for sequence in alone:
        run_whole(runner, [sequence])
    mixed = make_sequences(prompts, sampling, seed=3)
    run_at_random(runner, mixed, seed=3)
    outputs = [sequence.output_token_ids for sequence in alone]
    assert [sequence.output_token_ids for sequence in mixed] == outputs
    assert outputs[0] == outputs[3]
    assert len({tuple(output) for output in outputs}) == 3


def run_ahead(runner: ModelRunner, sequences: list[Sequence], seed: int) -> None:
    """Every step is launched before the tokens of the one before it are read, as an engine does that never idles."""
    rng = random.Random(seed)
    handle = batch = None
    while True:
        is_sampling = {id(sequence) for sequence in batch.sampled} if batch else set()
        running = [s for s in sequences if s.request.max_num_tokens - s.num_tokens > (id(s) in is_sampling)]
        chosen = rng.sample(running, rng.randint(1, len(running))) if running else []
        prefills, decodes = [], [sequence for sequence in chosen if sequence.num_computed_tokens >= sequence.prompt_len]
        for sequence in chosen:
            if sequence.num_computed_tokens < sequence.prompt_len:
                start = sequence.num_computed_tokens
                prefills.append(PrefillRow(sequence, start, rng.randint(1, sequence.prompt_len - start)))
        next_batch = Batch(prefills, decodes) if chosen else None
        next_handle = runner.launch(next_batch) if next_batch else None
        for row in prefills:
            row.sequence.num_computed_tokens = row.end
        if handle is not None:
            for sequence, token_id in zip(batch.sampled, handle.token_ids(), strict=True):
                sequence.append(token_id, frozenset())
        handle, batch = next_handle, next_batch
        if handle is None:
            return


def test_steps_launched_ahead_give_the_same_tokens(llama):
    """Also where the next token depends on the unread one: seeds by position, min_tokens, penalties."""
    runner = make_runner(llama)
    vocab_size = runner.model.spec.vocab_size
    runner.model.spec = replace(runner.model.spec, eos_token_ids=frozenset(range(0, vocab_size, 2)))
    prompts = random_prompts(vocab_size)
    limits = {"max_tokens": NUM_OUTPUT_TOKENS, "min_tokens": 5}
    sampling = [
        SamplingParams(**limits, temperature=0),
        SamplingParams(**limits, seed=7),
        SamplingParams(**limits, temperature=0, repetition_penalty=2.0),
        SamplingParams(**limits, temperature=0, frequency_penalty=2.0, presence_penalty=1.0),
        SamplingParams(**limits, seed=8, repetition_penalty=1.3),
        SamplingParams(max_tokens=3, temperature=0),
    ]
    whole = make_sequences(prompts, sampling)
    run_whole(runner, whole)
    for seed in (1, 2, 3):
        ahead = make_sequences(prompts, sampling, seed)
        run_ahead(runner, ahead, seed)
        assert [sequence.output_token_ids for sequence in ahead] == [sequence.output_token_ids for sequence in whole]


def test_end_of_sequence_is_not_sampled_before_min_tokens(tmp_path):
    """With the only likely token as EOS, it comes exactly when min_tokens allows it."""
    path = make_tiny_llama(tmp_path, tie_word_embeddings=True)
    runner = make_runner(path)
    prompts = random_prompts(runner.model.spec.vocab_size)[:2]
    free = make_sequences(prompts, [SamplingParams(max_tokens=1, temperature=0)] * 2)
    run_whole(runner, free)
    eos = [sequence.output_token_ids[0] for sequence in free]
    runner.model.spec = replace(runner.model.spec, eos_token_ids=frozenset(eos))
    held = make_sequences(
        prompts,
        [SamplingParams(max_tokens=4, min_tokens=3, temperature=0), SamplingParams(max_tokens=4, temperature=0)],
    )
    run_whole(runner, held)
    assert not set(eos) & set(held[0].output_token_ids[:3])
    assert held[1].output_token_ids[0] == eos[1]


def test_penalties_are_those_of_transformers(llama):
    """Repetition penalty over prompt and output, beside a row without penalties."""
    from transformers import AutoModelForCausalLM
    from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    runner = make_runner(llama)
    prompts = random_prompts(runner.model.spec.vocab_size)[4:]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    token_ids = torch.tensor([prompts[0]])
    for _ in range(NUM_OUTPUT_TOKENS):
        with torch.no_grad():
            scores = processors(token_ids, model(token_ids, use_cache=False).logits[:, -1])
        token_ids = torch.cat([token_ids, scores.argmax(-1, keepdim=True)], dim=1)
    greedy = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0)
    penalised = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0, repetition_penalty=1.5)
    sequences = make_sequences(prompts, [penalised, greedy])
    run_at_random(runner, sequences, seed=5)
    assert sequences[0].output_token_ids == token_ids[0, len(prompts[0]) :].tolist()
    assert sequences[1].output_token_ids == transformers_greedy(llama, prompts[1:], NUM_OUTPUT_TOKENS)[0]


def test_frequency_and_presence_penalties_end_a_repetition(tmp_path):
    """A presence penalty beyond any difference of logits makes every output token new."""
    runner = make_runner(make_tiny_llama(tmp_path, tie_word_embeddings=True))
    prompts = random_prompts(runner.model.spec.vocab_size)[:3]
    sampling = [
        SamplingParams(max_tokens=40, temperature=0),
        SamplingParams(max_tokens=40, temperature=0, presence_penalty=1000.0),
        SamplingParams(max_tokens=40, temperature=0, frequency_penalty=1000.0),
    ]
    sequences = make_sequences([prompts[0]] * 3, sampling)
    run_whole(runner, sequences)
    distinct = [len(set(sequence.output_token_ids)) for sequence in sequences]
    assert distinct[0] < 40, "the model does not repeat itself: a weak test"
    assert distinct[1:] == [40, 40]


def test_a_chunk_that_ends_inside_its_prompt_samples_nothing(llama):
    runner = make_runner(llama)
    prompt = random_prompts(runner.model.spec.vocab_size)[4]
    (sequence,) = make_sequences([prompt], [SamplingParams(max_tokens=2, temperature=0)])
    assert runner.run(Batch(prefills=[PrefillRow(sequence, 0, 8)])) == []
    assert sequence.output_token_ids == [] and sequence.num_computed_tokens == 0


@pytest.mark.parametrize("max_model_len", [2, 3, 8, 17, 32, None])
def test_the_warm_up_has_no_more_positions_than_the_model(llama, max_model_len):
    """On a CPU one beyond the rotary table is an error; on a GPU it would read what lies behind it."""
    runner = make_runner(llama, max_model_len=max_model_len)
    runner.kv_pool.zero_()
    runner.run_every_path(64, max_model_len or runner.model.spec.max_model_len)


def test_dtype_is_float32_on_a_cpu_and_the_checkpoint_s_on_a_gpu(llama):
    spec = replace(load_model_spec(llama), dtype="bfloat16")
    auto, half = ModelConfig(path=llama), ModelConfig(path=llama, dtype="float16")
    assert resolve_dtype(auto, spec, torch.device("cpu")) == torch.float32
    assert resolve_dtype(auto, spec, torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype(half, spec, torch.device("cpu")) == torch.float16
