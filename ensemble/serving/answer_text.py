"""The text of one answer, token by token: what is final of it, up to where it stops."""

from collections.abc import Collection

from ensemble.request import Request, Sequence
from ensemble.serving.stop_strings import StopStrings
from ensemble.tokenizer import IncrementalDetokenizer, Tokenizer


class AnswerText:
    """All that `push` and `flush` return, after the prompt's text, is what decoding all ids together gives."""

    def __init__(
        self, tokenizer: Tokenizer, request: Request, stop_strings: Collection[str], shows_stop: bool = False
    ) -> None:
        self._special_tokens = tokenizer.special_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_token_ids)
        self._stop_strings = StopStrings(stop_strings, self._special_tokens.values(), shows_stop)
        self._shows_stop = shows_stop
        self._min_tokens = request.sampling.min_tokens
        self._num_tokens = 0
        self.is_stopped = False  # by a stop string

    def push(self, token_id: int, is_end: bool) -> str:
        """`is_end`: the token ends the answer by itself, and has no text then unless that is shown."""
        self._num_tokens += 1
        special = self._special_tokens.get(token_id)
        if special is not None:
            return self._take(special, is_shown=False)
        return "" if is_end and not self._shows_stop else self._take(self._detokenizer.push([token_id]))

    def flush(self) -> str:
        """What is still held back, when no more tokens come."""
        return self._take(self._detokenizer.flush()) + self._stop_strings.flush()

    def _take(self, text: str, is_shown: bool = True) -> str:
        may_stop = self._num_tokens > self._min_tokens
        final, self.is_stopped = self._stop_strings.push(text, is_shown, may_stop)
        return final


def answer_text(tokenizer: Tokenizer, sequence: Sequence) -> str:
    """The text of a sequence that has ended."""
    answer = AnswerText(tokenizer, sequence.request, ())
    *token_ids, last = sequence.output_token_ids
    text = "".join(answer.push(token_id, is_end=False) for token_id in token_ids)
    return text + answer.push(last, is_end=sequence.finish_reason == "stop") + answer.flush()
