"""Prompts to token ids, and how many tokens may follow them."""

import asyncio
import json

from ensemble.chat import ChatTemplate
from ensemble.errors import InvalidRequest
from ensemble.openai_front.errors import RETRY_AFTER_S, ApiError
from ensemble.openai_front.protocol import Asked, ChatRequest, CompletionRequest
from ensemble.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's API has it
INLINE_CHARS = 4096  # a longer text is tokenized on a thread, so that the streams go on meanwhile
MAX_AT_ONCE = 4  # texts on threads
MAX_LONG = 64  # of them, with those that wait


class Prompts:
    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._max_model_len = max_model_len  # tokens, prompt and output together
        self._threads = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_long = 0  # texts on threads, and those that wait for one

    async def token_ids(self, asked: Asked) -> list[list[int]]:
        """Of each prompt of the request. Raises ApiError, InvalidRequest."""
        if isinstance(asked, ChatRequest):
            text = self._chat.render(json.dumps(asked.messages), asked.chat_template_kwargs)
            return [await self._encode(text, "messages", add_special_tokens=False)]
        assert isinstance(asked, CompletionRequest)
        return [
            await self._encode(each, "prompt", add_special_tokens=True) if isinstance(each, str) else each
            for each in asked.prompt
        ]

    def max_tokens(self, asked: Asked, prompt: list[int]) -> int:
        """What a request asks for, or else gets: of a chat all that the model's length leaves. Raises ApiError."""
        is_chat = isinstance(asked, ChatRequest)
        wanted = asked.max_completion_tokens if isinstance(asked, ChatRequest) else None
        wanted = wanted or asked.max_tokens or (None if is_chat else DEFAULT_MAX_TOKENS)
        room = self._max_model_len - len(prompt)
        if room < (wanted or 1):
            raise self._too_long("messages" if is_chat else "prompt", f"{len(prompt)} tokens", wanted)
        return wanted or room

    async def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        """Refuses a text that cannot fit by its length, before it is tokenized."""
        if len(text) > self._max_model_len * self._tokenizer.max_token_bytes:
            raise self._too_long(param, f"{len(text)} characters", None)
        if len(text) <= INLINE_CHARS:
            found = self._tokenizer.encode(text, add_special_tokens)
        else:
            found = await self._encode_long(text, add_special_tokens)
        if not found:
            raise InvalidRequest(param, text, "at least one token")
        return found

    async def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._num_long >= MAX_LONG:
            message = f"overloaded: {MAX_LONG} long texts wait to be tokenized"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=RETRY_AFTER_S)
        self._num_long += 1
        try:
            async with self._threads:
                return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)
        finally:
            self._num_long -= 1

    def _too_long(self, param: str, length: str, max_tokens: int | None) -> ApiError:
        asked = f" and max_tokens is {max_tokens}" if max_tokens else ""
        message = f"This model's maximum context length is {self._max_model_len} tokens, of prompt and output together."
        message += f" However, the {param} has {length}{asked}. Reduce one of them."
        return ApiError(400, message, param=param, code="context_length_exceeded")
