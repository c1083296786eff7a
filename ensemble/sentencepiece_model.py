"""LLaMA-2's kind of `tokenizer.model`, a SentencePiece BPE model with byte fallback, as a tokenizer of `tokenizers`.

The file is one protobuf message, whose fields are those of sentencepiece_model.proto in google/sentencepiece. Text is
split as the sentencepiece library splits it; around special tokens in a text, as by LLaMA-2's published tokenizer.json.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ensemble.errors import ModelError

SPACE = "▁"  # U+2581, which stands for a space in pieces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(1, 5)  # ModelProto.SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """`special_tokens`: `bos_token` and such |-> text, of those that the model has."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]


def read_sentencepiece_model(file: Path) -> SentencePieceModel:
    """Raises ModelError for a file that is no such model, or one of a kind that is not supported."""
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
    unsupported = {
        "a model that is not BPE": trainer.get(3, 1) != _BPE,
        "no byte fallback": not trainer.get(35, False),
        "spaces after words": bool(trainer.get(24, False)),
        "user-defined pieces": any(piece.kind == _USER_DEFINED for piece in pieces),
        "a normalization of characters": bool(normalizer.get(2)),
        "no space before the first word": not normalizer.get(3, True),
        "removal of extra spaces": bool(normalizer.get(4, True)),
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise ModelError(f"{file}: {feature} is not supported; save the tokenizer as tokenizer.json")
    ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
    special_tokens = {kind: pieces[i].text for kind, i in ids.items() if isinstance(i, int) and i < len(pieces)}
    return SentencePieceModel(_build(pieces, special_tokens["unk_token"]), special_tokens)


def _build(pieces: list[_Piece], unk_token: str) -> tokenizers.Tokenizer:
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, _merges(pieces), unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


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
