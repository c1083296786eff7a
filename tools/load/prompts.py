"""Prompts of exact lengths: token ids for `scheduler`, text for `ensemble`."""

import random

import numpy as np
import numpy.typing as npt

from ensemble.tokenizer import Tokenizer
from tools.load.workloads import HASH_BLOCK_TOKENS, Asked

TokenIds = npt.NDArray[np.int32]  # [prompt_len]


def token_ids(asked: Asked, vocab_size: int, rng: random.Random) -> TokenIds:
    """Random ids; what `hash_ids` name is the same in every prompt that names it, whatever `rng` is."""
    numbers = np.random.default_rng(rng.getrandbits(64))
    ids = numbers.integers(0, vocab_size, asked.lengths.prompt, dtype=np.int32)
    for index, hash_id in enumerate(asked.hash_ids):
        part = ids[index * HASH_BLOCK_TOKENS : (index + 1) * HASH_BLOCK_TOKENS]
        part[:] = np.random.default_rng(hash_id).integers(0, vocab_size, HASH_BLOCK_TOKENS, dtype=np.int32)[: len(part)]
    return ids


def one_token_pieces(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    """ASCII texts that are one token each."""
    ids = rng.sample(range(tokenizer.vocab_size), min(4096, tokenizer.vocab_size))
    texts = {token_id: tokenizer.decode([token_id]) for token_id in ids}
    return [
        text
        for token_id, text in texts.items()
        if text.isascii() and text.isprintable() and tokenizer.encode(text, add_special_tokens=False) == [token_id]
    ] or ["a"]


def random_text(tokenizer: Tokenizer, pieces: list[str], num_tokens: int, rng: random.Random) -> str:
    """Text of that many tokens, BOS included; pieces may make other tokens together, so some are cut off or added."""
    text = rng.choice(pieces)
    for _ in range(20):
        missing = num_tokens - len(tokenizer.encode(text))
        if missing > 0:
            text += "".join(rng.choices(pieces, k=missing))
        elif missing < 0:
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:missing]) or pieces[0]
        else:
            break
    return text
