"""Log-probabilities in the forms of OpenAI's two endpoints."""

from collections.abc import Iterable
from typing import Any

from ensemble.tokenizer import Tokenizer

MIN_LOG_PROB = -9999.0  # JSON has no infinity; OpenAI's API says this
Positions = list[dict[str, dict[str, Any]]]  # as in upstream.Piece


def chat_log_probs(positions: Positions, num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    content = []
    for position in positions:
        sampled, *_ = position.items()
        top = [_chat_entry(token_id, entry, tokenizer) for token_id, entry in _likeliest(position, num_top)]
        content.append({**_chat_entry(*sampled, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_log_probs(
    positions: Positions, num_top: int, tokenizer: Tokenizer, first_offset: int
) -> tuple[dict[str, Any], int]:
    """`text_offset` counts characters of the tokens' texts. Returns the offset after the last one, too."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = first_offset
    for position in positions:
        token_id, entry = next(iter(position.items()))
        text = _text(tokenizer.token_bytes(int(token_id)))
        shown = dict(_likeliest(position, num_top)) | {token_id: entry}
        found["tokens"].append(text)
        found["token_logprobs"].append(_log_prob(entry))
        found["top_logprobs"].append(
            {_text(tokenizer.token_bytes(int(each))): _log_prob(of_it) for each, of_it in shown.items()}
        )
        found["text_offset"].append(offset)
        offset += len(text)
    return found, offset


def _likeliest(position: dict[str, dict[str, Any]], num_top: int) -> Iterable[tuple[str, dict[str, Any]]]:
    ranked = sorted(position.items(), key=lambda each: each[1]["rank"])
    return [each for each in ranked if each[1]["rank"] <= num_top]


def _chat_entry(token_id: str, entry: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(int(token_id))
    return {"token": spelled.decode(errors="replace"), "logprob": _log_prob(entry), "bytes": list(spelled)}


def _log_prob(entry: dict[str, Any]) -> float:
    return max(MIN_LOG_PROB, float(entry["logprob"]))


def _text(spelled: bytes) -> str:
    """Of a token that is no text by itself its bytes, as OpenAI's API writes them."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
