"""Stop strings across token borders: text that may yet become one is held back, so that streamed text is final.

A stop string without a special token is looked for in the text that the client sees, one with a special token (such as
`<|im_end|>`) in the text with special tokens written out. What is found is what would be found character by character:
the string that ends first, and of several that end together the first of the list. It is not shown unless that is asked
for, special tokens never.
"""

from collections.abc import Collection
from itertools import compress


class StopStrings:
    """Follows one answer's text."""

    def __init__(
        self, strings: Collection[str], special_tokens: Collection[str] = (), shows_found: bool = False
    ) -> None:
        self._shows_found = shows_found
        joined = "\0".join(strings)
        found = [token for token in special_tokens if token in joined] if strings else []  # of a thousand, hardly one
        has_special = [any(token in string for token in found) for string in strings]
        numbered = list(enumerate(strings))
        self._of_all = _Strings(list(compress(numbered, has_special)))
        self._of_shown = _Strings(list(compress(numbered, (not has for has in has_special))))
        self._held = ""  # special tokens included, where a string has one
        self._is_shown = b""  # a byte for each character of `_held`: 0 in special tokens

    def push(self, text: str, is_shown: bool = True, may_stop: bool = True) -> tuple[str, bool]:
        """(text that is final now, whether a stop string ended the answer).

        `is_shown`: false for the text of a special token. `may_stop`: whether a stop string may end in this text.
        """
        if not self._of_all.strings and (not is_shown or not self._of_shown.strings):
            return text if is_shown else "", False
        self._held += text
        self._is_shown += (b"\1" if is_shown else b"\0") * len(text)
        shown = self._shown()
        found = []
        if may_stop and is_shown:
            found += self._of_shown.find(shown, len(text))
        if may_stop:
            in_all = self._of_all.find(self._held, len(text))
            found += [(end, number, sum(self._is_shown[:start])) for end, number, start in in_all]
        if found:
            end, _, start = min(found)
            num_after = sum(self._is_shown[len(self._held) - len(text) + end :])
            self._held, self._is_shown = "", b""
            return shown[: len(shown) - num_after if self._shows_found else start], True
        return shown[: len(shown) - self._hold(shown)], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown = self._shown()
        self._held, self._is_shown = "", b""
        return shown

    def _shown(self) -> str:
        return "".join(compress(self._held, self._is_shown)) if self._of_all.strings else self._held

    def _hold(self, shown: str) -> int:
        """Forgets what no stop string can begin with any more. Returns how many shown characters are held."""
        num_held = self._of_shown.num_begun(shown)
        start = len(self._held) - self._of_all.num_begun(self._held)
        num_kept = sum(self._is_shown[start:])
        while num_kept < num_held:
            start -= 1
            num_kept += self._is_shown[start]
        self._held, self._is_shown = self._held[start:], self._is_shown[start:]
        return num_kept


class _Strings:
    """What is looked for in one kind of text. Most of it has no character with which one begins or ends."""

    def __init__(self, numbered: list[tuple[int, str]]) -> None:
        self.strings = [string for _, string in numbered]
        self._numbered = numbered
        self._first_chars = {string[0] for string in self.strings}
        self._last_chars = {string[-1] for string in self.strings}
        self._longest = max(map(len, self.strings), default=0)

    def find(self, text: str, num_new: int) -> list[tuple[int, int, int]]:
        """Of each string that ends in the last `num_new` characters: (where in these, its number, where it starts)."""
        num_old = len(text) - num_new
        if self._last_chars.isdisjoint(text[num_old:]):
            return []
        starts = [
            (text.find(string, max(0, num_old - len(string) + 1)), number, string) for number, string in self._numbered
        ]
        return [(start + len(string) - num_old, number, start) for start, number, string in starts if start >= 0]

    def num_begun(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the strings begins, short of the whole string."""
        end = text[-self._longest :]
        if self._first_chars.isdisjoint(end):
            return 0
        for start in range(len(end)):
            if end[start] in self._first_chars:
                begun = end[start:]
                if any(len(string) > len(begun) and string.startswith(begun) for string in self.strings):
                    return len(begun)
        return 0
