"""Stop strings across token borders: text that may yet become one is held back, so that streamed text is final.

A stop string without a special token is looked for in the text that the client sees, one with a special token (such as
`<|im_end|>`) in the text with special tokens written out.
"""

from collections.abc import Collection, Sequence
from itertools import compress


class StopStrings:
    """Follows one answer's text. A stop string itself is never part of the answer."""

    def __init__(self, strings: Sequence[str], special_tokens: Collection[str] = ()) -> None:
        has_special = [any(token in string for token in special_tokens) for string in strings] if strings else []
        self._with_special = list(compress(strings, has_special))
        self._without = list(compress(strings, (not has for has in has_special)))
        self._held = ""  # special tokens included
        self._is_shown = b""  # a byte for each character of `_held`: 0 in special tokens

    def push(self, text: str, is_shown: bool = True, may_stop: bool = True) -> tuple[str, bool]:
        """(text that is final now, whether a stop string ended the answer).

        `is_shown`: false for the text of a special token. `may_stop`: whether a stop string may end in this text.
        """
        if not self._with_special and not self._without:
            return text if is_shown else "", False
        self._held += text
        self._is_shown += bytes([is_shown]) * len(text)
        shown = "".join(compress(self._held, self._is_shown))
        ends = []
        if may_stop and is_shown:
            ends += _starts(shown, self._without, len(text))
        if may_stop:
            ends += [sum(self._is_shown[:start]) for start in _starts(self._held, self._with_special, len(text))]
        if ends:
            self._held, self._is_shown = "", b""
            return shown[: min(ends)], True
        return shown[: len(shown) - self._hold(shown)], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown = "".join(compress(self._held, self._is_shown))
        self._held, self._is_shown = "", b""
        return shown

    def _hold(self, shown: str) -> int:
        """Forgets what no stop string can begin with any more. Returns how many shown characters are held."""
        num_held = _num_begun(shown, self._without)
        start = len(self._held) - _num_begun(self._held, self._with_special)
        num_kept = sum(self._is_shown[start:])
        while num_kept < num_held:
            start -= 1
            num_kept += self._is_shown[start]
        self._held, self._is_shown = self._held[start:], self._is_shown[start:]
        return num_kept


def _starts(text: str, strings: list[str], num_new: int) -> list[int]:
    """Where in `text` the strings start that end in its last `num_new` characters."""
    num_old = len(text) - num_new
    positions = (text.find(string, max(0, num_old - len(string) + 1)) for string in strings)
    return [position for position in positions if position >= 0]


def _num_begun(text: str, strings: list[str]) -> int:
    """Length of the longest end of `text` with which one of the strings begins, short of the whole string."""
    longest = max(map(len, strings), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(string) > length and string.startswith(end) for string in strings):
            return length
    return 0
