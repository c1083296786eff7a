"""Text to token ids and back, also token by token, on the `tokenizers` library."""

import functools
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ensemble.detokenizer import (
    ByteLevelText,
    ByteLevelTokens,
    SentencePieceText,
    SentencePieceTokens,
    TextDecoder,
)
from ensemble.errors import ModelError
from ensemble.sentencepiece_model import SPACE, read_sentencepiece_model
from ensemble.tokenizer_config import read_tokenizer_config

_SENTENCEPIECE_DECODERS = (
    ["Replace", "ByteFallback", "Fuse"],
    ["Replace", "ByteFallback", "Fuse", "Strip"],
    ["Replace"],
    ["Replace", "Fuse"],
    ["Replace", "Fuse", "Strip"],
)


_QWEN_WORDS = (  # every digit by itself
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """One model's tokenizer. Its methods may be called from any number of threads."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None) -> None:
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens: dict[int, str] = {i: token.content for i, token in added if token.special}
        self._backend = backend
        self._new_decoder, self._spelled, self._strips_first_space = _decoder_of(backend, self.special_tokens)
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
                backend = tokenizers.Tokenizer.from_str((path / "tokenizer.json").read_text(encoding="utf-8"))
                if _is_llamas(path, config.fields, backend):
                    _build_as_llamas(backend, config.fields)
            elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
                backend = _read_gpt2_files(path, config.fields)
            elif (path / "tokenizer.model").exists():
                names_of_pieces = {i: token.content for i, token in added_tokens.items()}
                is_legacy = bool(config.fields.get("legacy", True))
                model = read_sentencepiece_model(path / "tokenizer.model", names_of_pieces, is_legacy)
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
        # As a batch, for which alone the library lets go of the interpreter: else a long text would stop all threads.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """Of text that one token stands for, at most: a piece is spelled in no fewer bytes than its text."""
        return max(len(piece.encode()) for piece in self._backend.get_vocab(with_added_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for by itself, which may be half a character; of a special one its name."""
        spelled = self.special_tokens.get(token_id) or self._spelled(token_id)
        return spelled.encode() if isinstance(spelled, str) else spelled

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens without the special ones. Bytes that are no UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def decode_prompt(self, token_ids: Sequence[int]) -> str:
        """What `IncrementalDetokenizer` goes on with after these tokens: a half character is left to the answer."""
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(token_ids) + detokenizer.settle()


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

    After a prompt it is the text that `decode_prompt` goes on with: SentencePiece's space before a first word stays,
    and a character that the prompt has begun is completed. Costs the same after any prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decoder = tokenizer._new_decoder()
        self._strips_space = tokenizer._strips_first_space
        self.push(self._decoder.last_tokens(prompt_token_ids))
        self.settle()

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; a character whose last byte is still to come is held back."""
        return self._strip(self._decoder.push(token_ids))

    def settle(self) -> str:
        """Whole characters that are held back."""
        return self._strip(self._decoder.settle())

    def flush(self) -> str:
        """What is still held back: half a character, as U+FFFD. Ends the sequence."""
        return self._strip(self._decoder.flush())

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def _decoder_of(
    backend: tokenizers.Tokenizer, special_tokens: Container[int]
) -> tuple[Callable[[], TextDecoder], Callable[[int], str | bytes], bool]:
    """What makes a sequence's decoder, what tells a token's text or bytes, and whether the text's first space is none.

    Raises ModelError.
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        spelled = ByteLevelTokens(backend, special_tokens)
        return partial(ByteLevelText, spelled), spelled, False
    if kinds in _SENTENCEPIECE_DECODERS:
        space, has_bytes = steps[0]["pattern"]["String"], "ByteFallback" in kinds
        tokens = SentencePieceTokens(backend, special_tokens, space, has_bytes)
        return partial(SentencePieceText, tokens), tokens, "Strip" in kinds
    if kinds == ["Metaspace"]:
        tokens = SentencePieceTokens(backend, special_tokens, steps[0]["replacement"], has_bytes=False)
        return partial(SentencePieceText, tokens), tokens, steps[0].get("prepend_scheme") != "never"
    raise ModelError(
        f"tokenizer decoder {'+'.join(kinds)} is not supported; supported: ByteLevel, Metaspace,"
        f" {' and '.join('+'.join(names) for names in _SENTENCEPIECE_DECODERS)}"
    )


def _read_gpt2_files(path: Path, fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE without tokenizer.json, as OPT and Qwen have it; `fields`: of tokenizer_config.json."""
    vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, right in pairs]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    adds_space = bool(fields.get("add_prefix_space"))
    if _is_qwens(path, fields):
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=adds_space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _is_qwens(path: Path, fields: Mapping[str, Any]) -> bool:
    """As the configuration says, or, where that names no tokenizer, the model's."""
    return str(fields.get("tokenizer_class") or _model_type(path)).lower().startswith("qwen")


def _model_type(path: Path) -> Any:
    file = path / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.exists() else None


def _is_llamas(path: Path, fields: Mapping[str, Any], backend: tokenizers.Tokenizer) -> bool:
    """Of LLaMA's own class, and spelled by SentencePiece: of other models' transformers takes the file as it is."""
    model_type = _model_type(path)
    name = str(fields.get("tokenizer_class") or model_type)
    is_named = name in ("LlamaTokenizer", "LlamaTokenizerFast", "llama") and model_type in (None, "llama")
    return is_named and isinstance(backend.model, models.BPE) and "ByteFallback()" in str(backend.decoder)


def _build_as_llamas(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """As transformers 5 builds it, whatever the file says: a space before a text (before what follows an added token
    only if it is `legacy`), but not before another one."""
    scheme = "always" if fields.get("legacy") else "first"
    is_off = fields.get("add_prefix_space") is False
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never" if is_off else scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if is_off else [*steps, decoders.Strip(" ", 1, 0)])


def _found_as_written(token: AddedToken) -> AddedToken:
    """Normalized, with a space put before it, SentencePiece would find it at the start of a text alone."""
    return AddedToken(**{**token.__getstate__(), "normalized": False})


def _add_tokens(path: Path, backend: tokenizers.Tokenizer, added_tokens: dict[int, AddedToken]) -> None:
    """Those that the tokenizer itself does not know, or knows otherwise: what is special to it stays so. A new one gets
    the next id, which has to be the one it is said to have."""
    own = backend.get_added_tokens_decoder().values()
    known, special = {repr(token) for token in own}, {token.content for token in own if token.special}
    for token_id, token in sorted(added_tokens.items()):
        if repr(token) not in known:
            is_new = backend.token_to_id(token.content) is None
            is_special = token.special or token.content in special
            backend.add_tokens([AddedToken(**{**token.__getstate__(), "special": is_special})])
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
