import pytest

from ensemble.request import Request, SamplingParams
from ensemble.workers.messages import KVHandoff


@pytest.fixture(scope="session")
def make_request():
    def make(request_id, prompt_len, max_tokens=16):
        sampling = SamplingParams(max_tokens=max_tokens)
        return Request(request_id=request_id, prompt_token_ids=[1] * prompt_len, sampling=sampling)

    return make


@pytest.fixture(scope="session")
def make_handoff():
    def make(request, block_size=4):
        return KVHandoff(
            transfer_id=request.request_id,
            source="ipc://p",
            request=request,
            output_token_ids=[5],
            num_kv_tokens=request.prompt_len,
            block_ids=list(range(-(-request.prompt_len // block_size))),
        )

    return make
