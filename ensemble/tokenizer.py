"""Text to token ids and back, also token by token, on the `tokenizers` library.

Every token stands for some bytes; the text is the concatenation of the bytes, read as UTF-8. That holds for the two
families of tokenizers that OPT and LLaMA models have, byte-level BPE and SentencePiece with byte fallback, and makes
streaming exact and of constant cost per token: a character is complete when its last byte has come.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from ensemble.errors import ModelError
from ensemble.sentencepiece_model import read_sentencepiece_model

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SENTENCEPIECE_DECODERS = (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"])


class Tokenizer:
    """One model's tokenizer. Its methods may be called from any number of threads."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None) -> None:
        self._backend = backend
        self._token_bytes = _TokenBytes(backend)
        self.eos_token_id = eos_token_id
        self.vocab_size: int = backend.get_vocab_size()

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json (or vocab.json and merges.txt, or tokenizer.model) and tokenizer_config.json.

        Raises ModelError.
        """
        path = Path(path)
        try:
            config_file = path / "tokenizer_config.json"
            config = json.loads(config_file.read_text()) if config_file.exists() else {}
            names = {kind: _content(config[kind]) for kind in _SPECIAL_TOKENS if config.get(kind)}
            if (path / "tokenizer.json").exists():
                backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
                _add_special_tokens(backend, names)
            elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
                backend = _read_gpt2_files(path)
                _add_special_tokens(backend, names)
                if config.get("add_bos_token") and "bos_token" in names:
                    _start_with(backend, names["bos_token"])
            elif (path / "tokenizer.model").exists():
                model = read_sentencepiece_model(path / "tokenizer.model")
                backend, names = model.backend, model.special_tokens | names
                _refuse_added_tokens(path, config, backend)
                _add_special_tokens(backend, names)
                if config.get("add_bos_token", True) and "bos_token" in names:
                    _start_with(backend, names["bos_token"])
            else:
                raise ModelError(f"model path {path}: has no tokenizer.json")
            backend.no_truncation()
            backend.no_padding()
            return cls(backend, backend.token_to_id(names["eos_token"]) if "eos_token" in names else None)
        except ModelError:
            raise
        except Exception as error:  # what the library raises has no class of its own
            raise ModelError(f"model {path}: tokenizer cannot be read: {' '.join(str(error).split())}") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, by default with the special tokens that the model's texts start or end with, such as BOS."""
        # As a batch, for which alone the library lets go of the interpreter: else a long text would stop all threads.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """Of text that one token stands for, at most; a special token stands for its name."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        special = (len(token.content.encode()) for token in self._backend.get_added_tokens_decoder().values())
        return max(max(len(self._token_bytes.of(token_id)) for token_id in vocabulary.values()), *special, 1)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens without the special ones. Bytes that are no UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(token_ids) + detokenizer.flush()


class IncrementalDetokenizer:
    """Text of one sequence, token by token: all that `push` and `flush` return is `decode` of all tokens.

    `after_text` says that the tokens go on from a text, whose first word SentencePiece then separates by a space.
    """

    def __init__(self, tokenizer: Tokenizer, after_text: bool = False) -> None:
        self._token_bytes = tokenizer._token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer._token_bytes.strips_first_space and not after_text

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; a character whose last byte is still to come is held back."""
        return self._strip(self._decoder.decode(b"".join(map(self._token_bytes.of, token_ids))))

    def flush(self) -> str:
        """What is still held back: half a character, as U+FFFD. Ends the sequence."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


class _TokenBytes:
    """token id |-> its bytes, none for special tokens and ids without a token. Filled as tokens are met."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[int, bytes] = {}
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
        steps = decoder.get("decoders", [decoder])
        kinds = [step["type"] for step in steps]
        self._is_byte_level = kinds == ["ByteLevel"]
        self.strips_first_space = "Strip" in kinds
        if kinds in _SENTENCEPIECE_DECODERS:
            self._space = steps[0]["pattern"]["String"]
        elif not self._is_byte_level:
            raise ModelError(
                f"tokenizer decoder {'+'.join(kinds)} is not supported; supported: ByteLevel,"
                f" {' and '.join('+'.join(names) for names in _SENTENCEPIECE_DECODERS)}"
            )

    def of(self, token_id: int) -> bytes:
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._find(token_id)
        return found

    def _find(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(self._space, " ").encode()


def _read_gpt2_files(path: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE as the published OPT checkpoints have it, without tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _refuse_added_tokens(path: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Tokens beyond tokenizer.model, which older releases of transformers wrote beside it in several ways."""
    file = path / "added_tokens.json"
    added = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    added += json.loads(file.read_text()) if file.exists() else []
    for token in added:
        if backend.token_to_id(token) is None:
            raise ModelError(
                f"model {path}: token {token!r} added to tokenizer.model is not supported;"
                " save the tokenizer as tokenizer.json"
            )


def _add_special_tokens(backend: tokenizers.Tokenizer, names: dict[str, str]) -> None:
    """Makes special what tokenizer_config.json names and the tokenizer itself does not know as such."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in dict.fromkeys(names.values()) if token not in known]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _start_with(backend: tokenizers.Tokenizer, token: str) -> None:
    """Every encoded text starts with `token`."""
    special_tokens = [(token, backend.token_to_id(token))]
    backend.post_processor = processors.TemplateProcessing(single=[token, "$A"], special_tokens=special_tokens)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own byte, the 68 others for bytes from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
