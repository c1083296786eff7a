"""What the files beside a tokenizer say of its special and added tokens, read as transformers reads them.

tokenizer_config.json     names of special tokens, tokens added to the vocabulary (`added_tokens_decoder`), options
special_tokens_map.json   names of special tokens; counts only where the former adds no tokens
added_tokens.json         added tokens and their ids; likewise
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ensemble.errors import ModelError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    fields: dict[str, Any]  # of tokenizer_config.json
    special_tokens: dict[str, str]  # `bos_token` and such |-> text: what chat templates see
    extra_tokens: tuple[AddedToken, ...]  # `additional_special_tokens` and the like: without an id of their own
    added_tokens: dict[int, AddedToken]  # by the id they have


def read_tokenizer_config(path: Path) -> TokenizerConfig:
    """Of a model directory; each file may be absent. Raises ModelError that names the file."""
    file = path / "tokenizer_config.json"
    fields = _read_object(file)
    special, extra = _special_tokens(file, fields), _extra_tokens(file, fields)
    if "added_tokens_decoder" in fields:
        return TokenizerConfig(fields, special, extra, _added_tokens_decoder(file, fields["added_tokens_decoder"]))
    file = path / "special_tokens_map.json"
    special |= _special_tokens(file, _read_object(file))
    file = path / "added_tokens.json"
    added = {}
    for text, token_id in _read_object(file).items():
        is_special = text in special.values() or any(text == token.content for token in extra)
        added[_token_id(file, token_id)] = AddedToken(text, normalized=not is_special, special=is_special)
    return TokenizerConfig(fields, special, extra, added)


def _special_tokens(file: Path, fields: dict[str, Any]) -> dict[str, str]:
    """Also those of one model, such as `image_token`. `add_bos_token` is no token but an option."""
    tokens = {name: value for name, value in fields.items() if name.endswith("_token") and isinstance(value, str)}
    if isinstance(fields.get("extra_special_tokens"), dict):
        tokens |= fields["extra_special_tokens"]
    tokens |= {name: fields[name] for name in SPECIAL_TOKENS if name in fields}
    return {name: _text(file, name, token) for name, token in tokens.items() if token}


def _extra_tokens(file: Path, fields: dict[str, Any]) -> tuple[AddedToken, ...]:
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return ()
    if not isinstance(extra, list):
        raise ModelError(f"{file}: additional_special_tokens = {extra!r} is no list of tokens")
    return tuple(
        AddedToken(token, special=True) if isinstance(token, str) else _token(file, "additional_special_tokens", token)
        for token in extra
    )


def _added_tokens_decoder(file: Path, decoder: Any) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict):
        raise ModelError(f"{file}: added_tokens_decoder = {decoder!r} is no JSON object")
    return {
        _token_id(file, token_id): _token(file, f"added_tokens_decoder[{token_id!r}]", token)
        for token_id, token in decoder.items()
    }


def _token(file: Path, name: str, token: Any) -> AddedToken:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ModelError(f"{file}: {name} = {token!r} is no token")
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _token_id(file: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ModelError(f"{file}: {value!r} is no token id") from None


def _text(file: Path, name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ModelError(f"{file}: {name} = {token!r} is no token")
    return text


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return content
