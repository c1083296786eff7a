"""Tiny random checkpoints: complete model directories, written by transformers, small enough for every test.

    make_tiny_llama(path, **overrides)   config.json, generation_config.json, model.safetensors, tokenizer files
    make_tiny_opt(path, **overrides)     the same
    make_tiny_mistral, make_tiny_qwen2, make_tiny_qwen3   the same
    make_tiny_tokenizer(path, size)      tokenizer.json, tokenizer_config.json: byte-level BPE, any text round-trips

`overrides` are fields of transformers' configuration classes. The weights are a function of `seed`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 384

_CORPUS = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "A request waits in the queue until a batch has room for it; then its prompt is prefilled.",
    "Once upon a time there was a scheduler who never let anybody wait longer than was fair.",
    "Numbers such as 0, 1, 2, 10, 128 and 4096 are split into pieces, punctuation as well!",
    "Größe, naïve, Ελλάδα, Привет, 你好世界, こんにちは, and a smile 🙂 are text like any other.",
]


def make_tiny_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE, add_bos: bool = True) -> None:
    """Writes a byte-level BPE tokenizer of exactly `vocab_size` tokens whose first ids are BOS, EOS and PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


LLAMA_FIELDS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_tiny_llama(path: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A LLaMA of 2 layers with grouped-query attention (4 heads, 2 KV heads, head_dim 16), fp32. Returns `path`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _write(path, LlamaForCausalLM, LlamaConfig, LLAMA_FIELDS | overrides, seed, max_shard_size)


def make_tiny_mistral(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """The same shape; no window unless `sliding_window` is given."""
    from transformers import MistralConfig, MistralForCausalLM

    fields = LLAMA_FIELDS | {"sliding_window": None} | overrides
    return _write(path, MistralForCausalLM, MistralConfig, fields, seed, "5GB")


def make_tiny_qwen2(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """The same shape, with biases on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _write(path, Qwen2ForCausalLM, Qwen2Config, LLAMA_FIELDS | overrides, seed, "5GB")


def make_tiny_qwen3(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """The same shape, but for head_dim 32, which is not hidden_size / num_attention_heads; with norms of heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _write(path, Qwen3ForCausalLM, Qwen3Config, LLAMA_FIELDS | {"head_dim": 32} | overrides, seed, "5GB")


def make_tiny_opt(path: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """An OPT of 2 layers (4 heads, head_dim 16), pre-norm, fp32. Returns `path`."""
    from transformers import OPTConfig, OPTForCausalLM

    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_dim": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 512,
        "dropout": 0.0,
    }
    return _write(path, OPTForCausalLM, OPTConfig, fields | overrides, seed, max_shard_size)


def _write(
    path: Path, model_class: Any, config_class: Any, fields: dict[str, Any], seed: int, max_shard_size: str
) -> Path:
    fields = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "init_std": 0.1} | fields
    config = config_class(**fields, initializer_range=fields["init_std"])
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # transformers starts biases at 0 and norms at 1, where mistakes would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.random.set_rng_state(random_state)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tiny_tokenizer(path)
    return path
