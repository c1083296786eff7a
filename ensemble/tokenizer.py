"""Text to token ids and back, also token by token, on the `tokenizers` library.

Every token stands for some bytes; the text is the concatenation of the bytes, read as UTF-8. That holds for the two
families of tokenizers that OPT and LLaMA models have, byte-level BPE and SentencePiece with byte fallback, and makes
streaming exact and of constant cost per token: a character is complete when its last byte has come.
"""

import codecs
import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from ensemble.errors import ModelError
from ensemble.sentencepiece_model import read_sentencepiece_model
from ensemble.tokenizer_config import read_tokenizer_config

_SENTENCEPIECE_DECODERS = (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"])


class Tokenizer:
    """One model's tokenizer. Its methods may be called from any number of threads."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None) -> None:
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens: dict[int, str] = {i: token.content for i, token in added if token.special}
        self._backend = backend
        self._token_bytes = _TokenBytes(backend, self.special_tokens)
        self.eos_token_id = eos_token_id
        self.vocab_size: int = backend.get_vocab_size()

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json (or vocab.json and merges.txt, or tokenizer.model) and the files beside it.

        Raises ModelError.
        """
        path = Path(path)
        try:
            config = read_tokenizer_config(path)
            names, added_tokens, starts_with_bos = config.special_tokens, config.added_tokens, False
            has_post_processor = (path / "tokenizer.json").exists()  # then the options to add BOS and EOS mean nothing
            if has_post_processor:
                backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
                backend = _read_gpt2_files(path)
            elif (path / "tokenizer.model").exists():
                model = read_sentencepiece_model(path / "tokenizer.model")
                backend, names, starts_with_bos = model.backend, model.special_tokens | names, True
                added_tokens = {i: _found_as_written(token) for i, token in added_tokens.items()}
            else:
                raise ModelError(f"model path {path}: has no tokenizer.json")
            _add_tokens(path, backend, added_tokens)
            _add_special_tokens(backend, names.values())
            known = {token.content for token in backend.get_added_tokens_decoder().values()}
            backend.add_tokens([token for token in config.extra_tokens if token.content not in known])
            if not has_post_processor:
                bos = names.get("bos_token") if config.fields.get("add_bos_token", starts_with_bos) else None
                eos = names.get("eos_token") if config.fields.get("add_eos_token") else None
                _put_around(backend, bos, eos)
            backend.no_truncation()
            backend.no_padding()
            return cls(backend, backend.token_to_id(names["eos_token"]) if "eos_token" in names else None)
        except ModelError:
            raise
        except Exception as error:  # what the library raises has no class of its own
            raise ModelError(f"model {path}: tokenizer cannot be read: {' '.join(str(error).split())}") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, by default with the special tokens that the model's texts start or end with, such as BOS."""
        token_ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens without the special ones. Bytes that are no UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(token_ids) + detokenizer.flush()


def read_eos_token_id(path: Path) -> int | None:
    """As `Tokenizer.from_dir` has it, of a model directory that may be without a tokenizer. Raises ModelError.

    A large tokenizer takes half a second to read; most have their end token's id in tokenizer_config.json.
    """
    config = read_tokenizer_config(path)
    eos = config.special_tokens.get("eos_token")
    for token_id, token in config.added_tokens.items():
        if token.content == eos:
            return token_id
    if not any((path / name).exists() for name in ("tokenizer.json", "merges.txt", "tokenizer.model")):
        return None
    return Tokenizer.from_dir(path).eos_token_id


class IncrementalDetokenizer:
    """Text of one sequence, token by token: all that `push` and `flush` return is `decode` of all tokens.

    With a prompt it is the text that the prompt's goes on with: SentencePiece's space before a first word stays, and a
    character that the prompt has begun is completed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._token_bytes = tokenizer._token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=self._token_bytes.errors)
        self._strips_space = self._token_bytes.strips_first_space
        self._strip(self._decoder.decode(self._token_bytes.end_of(prompt_token_ids)))

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

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Container[int]) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._cache: dict[int, bytes] = {}
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
        steps = decoder.get("decoders", [decoder])
        kinds = [step["type"] for step in steps]
        self._is_byte_level = kinds == ["ByteLevel"]
        self.strips_first_space = "Strip" in kinds
        self.errors = "replace" if self._is_byte_level else _REPLACE_EACH_BYTE
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

    def end_of(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes of the tokens' text, enough to tell a character that has only begun: three, if it has them."""
        end = b""
        for token_id in reversed(token_ids):
            end = self.of(token_id) + end
            if len(end) >= 3:
                break
        return end

    def _find(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_tokens:
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


def _found_as_written(token: AddedToken) -> AddedToken:
    """Normalized, with a space put before it, SentencePiece would find it at the start of a text alone."""
    return AddedToken(**{**token.__getstate__(), "normalized": False})


def _add_tokens(path: Path, backend: tokenizers.Tokenizer, added_tokens: dict[int, AddedToken]) -> None:
    """Those that the tokenizer itself does not know, or knows otherwise. A new one gets the next id, which has to be
    the one it is said to have."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(added_tokens.items()):
        if repr(token) not in known:
            is_new = backend.token_to_id(token.content) is None
            backend.add_tokens([token])
            if is_new and (next_id := backend.token_to_id(token.content)) != token_id:
                raise ModelError(
                    f"model {path}: the added token {token.content!r} has the id {token_id},"
                    f" but the next after the tokenizer's own is {next_id}"
                )


def _add_special_tokens(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes special what the files beside the tokenizer name and the tokenizer itself does not know as such."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in dict.fromkeys(texts) if token not in known]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _put_around(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Every encoded text starts with `bos` and ends with `eos`, where they are given."""
    tokens = [token for token in (bos, eos) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in tokens],
    )


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """As SentencePiece shows bytes that are no text."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


_REPLACE_EACH_BYTE = "distserve.replace_each_byte"
codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own byte, the 68 others for bytes from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
