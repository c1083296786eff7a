"""Token ids to text as they come, of the two families of tokenizers that are served.

    ByteLevelText       every token stands for bytes, the text is all of them, read as UTF-8 (GPT-2's alphabet)
    SentencePieceText   a token stands for whole characters, or for one byte of a character that has no token

A character is shown when its last byte has come; of bytes that are no text each family shows what transformers shows.
"""

import codecs
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Protocol

import tokenizers

REPLACEMENT = "\ufffd"


class TextDecoder(Protocol):
    """Of one sequence. All that `push` and `flush` return is the sequence's text."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def settle(self) -> str:
        """Whole characters that are held back: they belong to the text so far, such as a prompt."""
        ...

    def flush(self) -> str:
        """All that is held back, half a character too. Ends the sequence."""
        ...

    def last_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        """As many as tell how a text goes on after all of them."""
        ...


class ByteLevelText:
    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def settle(self) -> str:
        return ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def last_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        num_bytes, start = 0, len(token_ids)
        while start > 0 and num_bytes < 3:  # of a character that has begun at most three bytes have come
            start -= 1
            num_bytes += len(self._bytes_of(token_ids[start]))
        return token_ids[start:]


class SentencePieceText:
    """A run of byte tokens that is no UTF-8 as a whole is shown as one U+FFFD for each byte.

    That is known when the run ends. Until then a character is held back that byte tokens are not meant for: ASCII, but
    for line breaks and tabs. Others are shown at once, and stay, whatever else the run brings.
    """

    def __init__(self, text_of: Callable[[int], str | bytes]) -> None:
        self._text_of = text_of
        self._run = b""  # bytes that are held back
        self._is_broken = False  # the run is no UTF-8

    def push(self, token_ids: Iterable[int]) -> str:
        texts = []
        for token_id in token_ids:
            text = self._text_of(token_id)
            if isinstance(text, bytes):
                texts.append(self._push_byte(text))
            elif text:  # a token without a text does not end a run
                texts += [self.flush(), text]
        return "".join(texts)

    def settle(self) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")()
        text = decoder.decode(self._run)
        self._run = decoder.getstate()[0]
        return text

    def flush(self) -> str:
        run, self._run, self._is_broken = self._run, b"", False
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def last_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        start = len(token_ids)
        while start > 0:
            start -= 1
            text = self._text_of(token_ids[start])
            if text and isinstance(text, str):
                break
        return token_ids[start:]

    def _push_byte(self, byte: bytes) -> str:
        if self._is_broken:
            return REPLACEMENT
        self._run += byte
        try:
            text = self._run.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            num_bytes, self._run, self._is_broken = len(self._run), b"", True
            return REPLACEMENT * num_bytes
        if text[-1].isascii() and text[-1] not in "\t\n\r":
            return ""
        self._run = b""
        return text


class ByteLevelTokens:
    """token id |-> its bytes, none for special tokens and ids without a token. Filled as tokens are met."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Container[int]) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._cache: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._find(token_id)
        return found

    def _find(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_tokens:
            return b""
        if all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return token.encode()


class SentencePieceTokens:
    """token id |-> its text, or its byte; none for special tokens and ids without a token. Filled as tokens are met."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Container[int], space: str, has_bytes: bool
    ) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._space = space  # the character that stands for a space
        self._has_bytes = has_bytes  # <0x0A> is a byte, and no text
        self._cache: dict[int, str | bytes] = {}

    def __call__(self, token_id: int) -> str | bytes:
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._find(token_id)
        return found

    def _find(self, token_id: int) -> str | bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_tokens:
            return ""
        if self._has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return token.replace(self._space, " ")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own byte, the 68 others for bytes from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
