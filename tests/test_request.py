"""When a sequence stops, in every combination of what may stop it: as vLLM decides."""

import msgspec
import pytest

from ensemble.request import Request, SamplingParams, Sequence

EOS, STOP, OTHER = 2, 7, 5

# SamplingParams, tokens sampled, reason after the last of them; none of those before it ends the sequence
CASES = [
    ({}, [OTHER], None),
    ({}, [OTHER, EOS], "stop"),
    ({}, [OTHER, STOP], None),
    ({"max_tokens": 2}, [OTHER, OTHER], "length"),
    ({"max_tokens": 2}, [OTHER, EOS], "stop"),
    ({"max_tokens": 2, "stop_token_ids": (STOP,)}, [OTHER, STOP], "stop"),
    ({"ignore_eos": True}, [EOS, EOS], None),
    ({"ignore_eos": True, "max_tokens": 2}, [EOS, EOS], "length"),
    ({"stop_token_ids": (STOP,)}, [OTHER, STOP], "stop"),
    ({"stop_token_ids": (STOP,)}, [OTHER, EOS], "stop"),
    ({"stop_token_ids": (STOP,), "ignore_eos": True}, [EOS, STOP], "stop"),
    ({"stop_token_ids": (STOP, EOS), "ignore_eos": True}, [OTHER, EOS], "stop"),
    ({"min_tokens": 2}, [EOS], None),
    ({"min_tokens": 2}, [EOS, EOS], "stop"),
    ({"min_tokens": 2, "stop_token_ids": (STOP,)}, [STOP, OTHER, STOP], "stop"),
    ({"min_tokens": 3, "max_tokens": 3}, [EOS, EOS, EOS], "stop"),
    ({"min_tokens": 3, "max_tokens": 3}, [EOS, EOS, OTHER], "length"),
    ({"min_tokens": 3, "max_tokens": 3, "ignore_eos": True}, [EOS, EOS, EOS], "length"),
]


@pytest.mark.parametrize(("sampling", "token_ids", "reason"), CASES)
def test_a_sequence_stops_when_vllm_would_stop_it(sampling, token_ids, reason):
    request = Request(request_id=0, prompt_token_ids=[1], sampling=SamplingParams(**sampling))
    sequence = Sequence(msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request))
    for token_id in token_ids[:-1]:
        assert sequence.append(token_id, frozenset([EOS])) is None
    assert sequence.append(token_ids[-1], frozenset([EOS])) == reason
    assert sequence.is_finished == (reason is not None)
