"""A SentencePiece `tokenizer.model`, such as LLaMA-2's and Mistral's, as a tokenizer of `tokenizers`.

The file is one protobuf message, whose fields are those of sentencepiece_model.proto in google/sentencepiece. Text is
split as the sentencepiece library splits it; around special and added tokens in a text, as transformers splits it.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ensemble.errors import ModelError

SPACE = "▁"  # U+2581, which stands for a space in pieces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(1, 5)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a model says of itself, with the defaults of sentencepiece_model.proto."""

    model_type: int
    has_byte_fallback: bool
    charsmap: bytes  # by which characters are normalized; empty: they are not
    starts_with_space: bool
    drops_extra_spaces: bool
    is_legacy: bool  # not of the model: what follows an added token begins with a space as a text does

    @classmethod
    def of(cls, trainer: Mapping[int, Any], normalizer: Mapping[int, Any], is_legacy: bool) -> "_Settings":
        return cls(
            trainer.get(3, _UNIGRAM),
            bool(trainer.get(35, False)),
            normalizer.get(2, b""),
            bool(normalizer.get(3, True)),
            bool(normalizer.get(4, True)),
            is_legacy,
        )


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """`special_tokens`: `bos_token` and such |-> text, of those that the model has."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]


def read_sentencepiece_model(
    file: Path, names: Mapping[int, str] | None = None, is_legacy: bool = True
) -> SentencePieceModel:
    """`names`: of pieces that the files beside it call otherwise, by id. `is_legacy`: see _Settings.

    Raises ModelError for a file that is no such model, or one of a kind that is not supported.
    """
    parts: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    try:
        for number, value in _fields(file.read_bytes()):
            if number in parts and isinstance(value, bytes):
                parts[number].append(value)
        pieces = [_read_piece(message) for message in parts[1]]
        trainer, normalizer = (
            {number: value for message in parts[part] for number, value in _fields(message)} for part in (2, 3)
        )
    except (IndexError, ValueError, struct.error):
        pieces = []
    if not pieces:
        raise ModelError(f"{file}: is no SentencePiece model")
    settings = _Settings.of(trainer, normalizer, is_legacy)
    unsupported = {
        "a model that is neither BPE nor unigram": settings.model_type not in (_UNIGRAM, _BPE),
        "spaces after words": bool(trainer.get(24, False)),
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise ModelError(f"{file}: {feature} is not supported; save the tokenizer as tokenizer.json")
    pieces = _renamed(pieces, names or {})
    ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
    special_tokens = {kind: pieces[i].text for kind, i in ids.items() if isinstance(i, int) and i < len(pieces)}
    return SentencePieceModel(_build(pieces, settings, special_tokens["unk_token"]), special_tokens)


def _renamed(pieces: list[_Piece], names: Mapping[int, str]) -> list[_Piece]:
    """A name that another piece has, and keeps, is not given."""
    kept = {piece.text for i, piece in enumerate(pieces) if i not in names}
    return [
        _Piece(names[i], piece.score, piece.kind) if i in names and names[i] not in kept else piece
        for i, piece in enumerate(pieces)
    ]


def _build(pieces: list[_Piece], settings: _Settings, unk_token: str) -> tokenizers.Tokenizer:
    user_defined = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    if settings.model_type == _BPE:
        model: models.Model = models.BPE(
            {piece.text: i for i, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=unk_token,
            fuse_unk=True,
            byte_fallback=settings.has_byte_fallback,
            ignore_merges=bool(user_defined),
        )
    else:
        scores = [(piece.text, piece.score) for piece in pieces]
        unk_id = [piece.text for piece in pieces].index(unk_token)
        model = models.Unigram(scores, unk_id=unk_id, byte_fallback=settings.has_byte_fallback)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(_normalizers(settings))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_pre_tokenizers(settings, user_defined))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            *([decoders.ByteFallback()] if settings.has_byte_fallback else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if settings.starts_with_space else []),
        ]
    )
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _normalizers(settings: _Settings) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if settings.charsmap:
        found.append(normalizers.Precompiled(settings.charsmap))
    if settings.drops_extra_spaces:
        ends, runs = normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")
        found += [ends, runs]
    if settings.starts_with_space and settings.is_legacy:
        found.append(normalizers.Prepend(SPACE))
    return [*found, normalizers.Replace(" ", SPACE)]


def _pre_tokenizers(settings: _Settings, user_defined: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    found: list[pre_tokenizers.PreTokenizer] = []
    if settings.starts_with_space and not settings.is_legacy:
        found.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if user_defined:  # stay whole; as they are in a text whose spaces are written as pieces have them
        longest_first = sorted(user_defined, key=len, reverse=True)
        found.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"))
    return found


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first: what BPE merges next."""
    normal = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    merges = [
        (score, text[:split], text[split:])
        for text, score in normal.items()
        for split in range(1, len(text))
        if text[:split] in normal and text[split:] in normal
    ]
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _read_piece(message: bytes) -> _Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return _Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int, or the bytes of a float, a string or a message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > len(message):
            raise ValueError("the message is cut off")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the value, of which every byte has seven bits, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
