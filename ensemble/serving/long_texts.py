"""Long texts are tokenized on threads of their own, few at a time: a text of 200 kB takes 50 ms of a core.

Short ones are tokenized where they are, which takes less than handing them over. Those that cannot fit too: they are
refused by their length in bytes, before anything reads them.
"""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from ensemble.errors import Overloaded

SHORT_BYTES = 4096
MAX_LONG_TEXTS = 32  # waiting or being tokenized
RETRY_AFTER_S = 1.0


class LongTexts:
    """Of one process. Two cores leave it one thread."""

    def __init__(self, max_text_bytes: int) -> None:
        self._max_text_bytes = max_text_bytes
        self._room = threading.BoundedSemaphore(MAX_LONG_TEXTS)
        self._pool = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 4)), thread_name_prefix="tokenize")

    def is_long(self, num_bytes: int) -> bool:
        """Whether a prompt of so many bytes goes to `submit`."""
        return SHORT_BYTES < num_bytes <= self._max_text_bytes

    def submit(self, work: Callable[[], None]) -> None:
        """`work`, which answers for its own errors, is done on a thread. Raises Overloaded."""
        if not self._room.acquire(blocking=False):
            raise Overloaded(f"{MAX_LONG_TEXTS} long texts wait to be tokenized", RETRY_AFTER_S)
        self._pool.submit(work).add_done_callback(lambda future: self._room.release())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def prompt_bytes(tensors: Mapping[str, npt.NDArray[Any]]) -> int:
    """Of the text that has to be tokenized; 0 if there are token ids."""
    if "input_ids" in tensors:
        return 0
    raws = (raw for name in ("text_input", "messages") if name in tensors for raw in tensors[name].reshape(-1))
    return sum(len(raw) for raw in raws)
