"""Which tokens end a model's answers: what config.json, generation_config.json and the tokenizer name, together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble.errors import ModelError
from ensemble.tokenizer import read_eos_token_id


def read_end_token_ids(
    path: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int
) -> frozenset[int]:
    """`eos_token_id` may be an id or a list of ids; null and -1 are none. Raises ModelError for an id that is no token:
    it could never be sampled, and a mask of it would be out of bounds."""
    named = {
        "config.json: eos_token_id": config.get("eos_token_id"),
        "generation_config.json: eos_token_id": generation_config.get("eos_token_id"),
        "tokenizer_config.json: id of eos_token": read_eos_token_id(path),
    }
    found = set()
    for name, value in named.items():
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None or token_id == -1:
                continue
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ModelError(
                    f"{path / name} = {token_id!r} is not in the vocabulary: ids from 0 to {vocab_size - 1}"
                )
            found.add(token_id)
    return frozenset(found)
