import pytest

from ensemble.request import Request, SamplingParams


@pytest.fixture(scope="session")
def make_request():
    def make(request_id, prompt_len, max_tokens=16, num_resumed_tokens=0):
        return Request(
            request_id=request_id,
            prompt_token_ids=[1] * prompt_len,
            sampling=SamplingParams(max_tokens=max_tokens),
            resumed_token_ids=[1] * num_resumed_tokens,
        )

    return make
