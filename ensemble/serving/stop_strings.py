"""Stop strings across token borders: text that may yet become one is held back, so that streamed text is final."""

from collections.abc import Sequence


class StopStrings:
    """Follows one answer's text. A stop string itself is never part of the answer."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is final now, whether a stop string ended the answer)."""
        text = self._held + text
        ends = [position for string in self._strings if (position := text.find(string)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(string) for string in self._strings), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
