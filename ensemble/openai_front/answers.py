"""What is answered: JSON of whole answers, and of the chunks of streamed ones, in the forms of both endpoints."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from ensemble.openai_front.log_probs import Positions, chat_log_probs, completion_log_probs
from ensemble.openai_front.protocol import Asked
from ensemble.openai_front.upstream import Piece
from ensemble.tokenizer import Tokenizer

Json = dict[str, Any]


class Answer(ABC):
    """To one request, whose choices are numbered across its prompts."""

    prefix: str  # of its id
    kind: str  # of a whole answer
    chunk_kind: str

    def __init__(self, asked: Asked, num_prompt_tokens: int, tokenizer: Tokenizer) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self._head = {"created": int(time.time()), "model": asked.model}
        self._num_top = asked.num_logprobs or 0
        self._tokenizer = tokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0

    def chunk_head(self) -> Json:
        return {"id": self.id, "object": self.chunk_kind, **self._head}

    def usage(self) -> Json:
        """Of all choices; a prompt counts once, however many there are of it."""
        num_prompt, num_output = self._num_prompt_tokens, self._num_output_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}

    def chunk_choices(self, piece: Piece) -> list[Json]:
        """Of each chunk that a piece is sent as, its one choice."""
        self._num_output_tokens += piece.num_tokens
        return self._chunk_choices(piece)

    async def whole(self, pieces: AsyncIterator[Piece]) -> Json:
        by_choice: dict[int, list[Piece]] = {}
        async for piece in pieces:
            self._num_output_tokens += piece.num_tokens
            by_choice.setdefault(piece.choice, []).append(piece)
        choices = [
            {
                "index": choice,
                **self._content("".join(piece.text for piece in of_it)),
                "logprobs": self._log_probs(choice, [each for piece in of_it for each in piece.log_probs or []])
                if of_it[0].log_probs is not None
                else None,
                "finish_reason": of_it[-1].finish_reason,
            }
            for choice, of_it in sorted(by_choice.items())
        ]
        return {"id": self.id, "object": self.kind, **self._head, "choices": choices, "usage": self.usage()}

    def _log_probs_of(self, piece: Piece) -> Json | None:
        return None if piece.log_probs is None else self._log_probs(piece.choice, piece.log_probs)

    @abstractmethod
    def _chunk_choices(self, piece: Piece) -> list[Json]: ...

    @abstractmethod
    def _content(self, text: str) -> Json: ...

    @abstractmethod
    def _log_probs(self, choice: int, positions: Positions) -> Json: ...


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, num_prompt_tokens: int, tokenizer: Tokenizer) -> None:
        super().__init__(asked, num_prompt_tokens, tokenizer)
        self._offsets: dict[int, int] = {}  # choice |-> characters of its tokens so far

    def _chunk_choices(self, piece: Piece) -> list[Json]:
        choice = {"index": piece.choice, "text": piece.text, "logprobs": self._log_probs_of(piece)}
        return [{**choice, "finish_reason": piece.finish_reason}]

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _log_probs(self, choice: int, positions: Positions) -> Json:
        offset = self._offsets.get(choice, 0)
        found, self._offsets[choice] = completion_log_probs(positions, self._num_top, self._tokenizer, offset)
        return found


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: Asked, num_prompt_tokens: int, tokenizer: Tokenizer) -> None:
        super().__init__(asked, num_prompt_tokens, tokenizer)
        self._begun: set[int] = set()  # choices whose role has been told

    def _chunk_choices(self, piece: Piece) -> list[Json]:
        deltas: list[tuple[Json, Json | None, str | None]] = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            deltas.append(({"role": "assistant", "content": ""}, None, None))
        if piece.text or piece.log_probs:
            deltas.append(({"content": piece.text}, self._log_probs_of(piece), None))
        if piece.finish_reason is not None:
            deltas.append(({}, None, piece.finish_reason))
        return [
            {"index": piece.choice, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
            for delta, log_probs, reason in deltas
        ]

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _log_probs(self, choice: int, positions: Positions) -> Json:
        return chat_log_probs(positions, self._num_top, self._tokenizer)
