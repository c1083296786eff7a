"""Stop strings: found across token borders, never shown, and nothing shown that would have to be taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.serving.stop_strings import StopStrings
from tests.serving.clients import blocks_in_use, generate, read_metrics
from tools.server.triton_server import TritonServer

pieces = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(pieces, stops)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown, whole = "", ""
    for piece in pieces:
        whole += piece
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            break
    else:
        stopped = False
        shown += matcher.flush()
    first = min((position for stop in stops if (position := whole.find(stop)) >= 0), default=None)
    assert stopped == (first is not None)
    assert shown == (whole if first is None else whole[:first])


@given(pieces, stops)
def test_nothing_is_held_back_longer_than_needed(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown, whole = "", ""
    for piece in pieces:
        whole += piece
        text, stopped = matcher.push(piece)
        if stopped:
            return
        shown += text
        held = whole[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.server
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_words_through_the_server(tiny_server: TritonServer, model: str, stream: bool) -> None:
    asked = {"text_input": "The capital", "max_tokens": 100, "temperature": 0.0, "ignore_eos": True, "stream": stream}
    asked |= {"return_num_output_tokens": True, "return_finish_reason": True}
    whole = generate(tiny_server.grpc_url, model, **asked).text
    stop = whole[20:23]
    answer = generate(tiny_server.grpc_url, model, stop_words=["never in the text", stop], **asked)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert sum(int(each["num_output_tokens"].reshape(-1)[0]) for each in answer.responses) < 100
    generate(tiny_server.grpc_url, model, text_input="x", max_tokens=1)
    assert generate(tiny_server.grpc_url, model, **asked).text == whole


@pytest.mark.server
def test_a_stopped_sequence_leaves_decode(tiny_server: TritonServer) -> None:
    asked = {"text_input": "The capital", "temperature": 0.0, "ignore_eos": True, "stream": True}
    first = generate(tiny_server.grpc_url, max_tokens=1, **asked).text
    for _ in range(4):
        generate(tiny_server.grpc_url, max_tokens=500, stop_words=[first], **asked)
    for _ in range(100):
        if blocks_in_use(read_metrics(tiny_server.metrics_url)) == 0:
            return
        generate(tiny_server.grpc_url, max_tokens=1, **asked)
    raise AssertionError("blocks are still in use")
