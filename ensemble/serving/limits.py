"""What a request is checked against: the model, and how long a text can be that still fits."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ensemble.config import Deployment
from ensemble.errors import InvalidRequest
from ensemble.models.spec import load_model_spec
from ensemble.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: frozenset[int]
    max_token_bytes: int  # of text

    @classmethod
    def of(cls, deployment: Deployment, tokenizer: Tokenizer) -> "ModelLimits":
        spec = load_model_spec(deployment.model.path)
        max_model_len = deployment.model.limit_model_len(spec.max_model_len)
        return cls(spec.vocab_size, max_model_len, spec.eos_token_ids, tokenizer.max_token_bytes)

    @property
    def max_text_bytes(self) -> int:
        """No text that is longer has so few tokens that it fits."""
        return self.max_model_len * self.max_token_bytes


def check(field: str, value: Any, is_valid: bool, allowed: str) -> None:
    if not is_valid:  # comparisons with NaN are false, so NaN is never valid
        raise InvalidRequest(field, value, allowed)


def check_text(field: str, text: bytes, limits: ModelLimits) -> None:
    allowed = f"at most {limits.max_text_bytes} bytes, {limits.max_model_len} tokens (max_model_len)"
    allowed += f" of at most {limits.max_token_bytes} bytes"
    check(f"length of {field}", f"{len(text)} bytes", len(text) <= limits.max_text_bytes, allowed)


def check_num_bytes(field: str, tensor: npt.NDArray[Any], limit: int) -> None:
    num_bytes = sum(len(raw) for raw in tensor.reshape(-1))
    check(f"length of {field}", f"{num_bytes} bytes", num_bytes <= limit, f"at most {limit} bytes")


def check_num_tokens(field: str, num_tokens: int, limits: ModelLimits) -> None:
    check(
        f"length of {field}",
        num_tokens,
        num_tokens < limits.max_model_len,
        f"at most {limits.max_model_len - 1} tokens, one less than max_model_len",
    )
