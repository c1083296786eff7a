"""Stop strings: found across token borders, never shown, and nothing shown that would have to be taken back."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.request import FinishReason, Request, SamplingParams, Sequence
from ensemble.serving.answer_text import AnswerText, answer_text
from ensemble.serving.stop_strings import StopStrings
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import make_tiny_tokenizer
from tests.serving.clients import blocks_in_use, generate, read_metrics
from tools.server.triton_server import TritonServer

pieces = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(pieces, stops, st.booleans())
def test_text_ends_at_the_first_stop_string_however_it_is_cut(
    pieces: list[str], stops: list[str], shows_found: bool
) -> None:
    matcher = StopStrings(stops, shows_found=shows_found)
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
    expected = text_before_stop(whole, stops, shows_found)
    assert stopped == (expected is not None)
    assert shown == (whole if expected is None else expected)


def text_before_stop(text: str, stops: list[str], shows_found: bool = False) -> str | None:
    """Character by character."""
    ends = ((length, stop) for length in range(len(text) + 1) for stop in stops if text[:length].endswith(stop))
    return next((text[: length - (not shows_found) * len(stop)] for length, stop in ends), None)


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


SPECIAL = "<|end|>"
mixed = st.lists(st.one_of(st.text(alphabet="ab", max_size=3), st.just(SPECIAL)), max_size=10)
mixed_stops = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", SPECIAL]), min_size=1, max_size=3).map("".join), min_size=1, max_size=3
)


@given(mixed, mixed_stops, st.integers(0, 4), st.booleans())
def test_special_tokens_match_but_are_not_shown_and_nothing_stops_early(
    pieces: list[str], stops: list[str], num_early: int, shows_found: bool
) -> None:
    """Against a search of the whole text after each piece, character by character of it."""
    matcher = StopStrings(stops, [SPECIAL, "<s>"], shows_found)
    expected, shown, stopped = None, "", False
    for count, piece in enumerate(pieces, 1):
        whole, before = "".join(pieces[:count]), "".join(pieces[: count - 1])
        visible = whole.replace(SPECIAL, "")
        ends = []
        for number, stop in enumerate(stops if count > num_early else []):
            text, old = (whole, before) if SPECIAL in stop else (visible, before.replace(SPECIAL, ""))
            for end in range(len(old) + 1, len(text) + 1):
                if text[:end].endswith(stop):
                    shown_end = end if shows_found else end - len(stop)
                    ends.append((end - len(old), number, text[:shown_end].replace(SPECIAL, "")))
        text, stopped = matcher.push(piece, is_shown=piece != SPECIAL, may_stop=count > num_early)
        shown += text
        assert visible.startswith(shown)
        if ends:
            expected = min(ends)[2]
            break
    assert stopped == (expected is not None)
    assert shown + matcher.flush() == ("".join(pieces).replace(SPECIAL, "") if expected is None else expected)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return Tokenizer.from_dir(path)


# stop strings, parameters, how the answer to "The" goes on, whether it ends itself |-> text, stopped after how many
ANSWERS = [
    ([], {}, " river</s>", True, " river", None),
    ([], {}, " river", True, " rive", None),  # an end token that is not special has no text either
    ([], {"ignore_eos": True}, " a</s>b", False, " ab", None),
    (["</s>"], {"ignore_eos": True}, " a</s>b", False, " a", 3),
    (["a</s>"], {"ignore_eos": True}, " a</s>b", False, " ", 3),
    (["a</s>b"], {"ignore_eos": True}, " a</s>b", False, " ", 4),
    (["ab"], {"ignore_eos": True}, " a</s>b", False, " ", 4),
    (["/s>"], {"ignore_eos": True}, " a</s>b", False, " ab", None),
    (["a</s>"], {}, " a</s>", True, " ", 3),
    (["b"], {"min_tokens": 2}, "bbbb", False, "bb", 3),
    (["bb"], {"min_tokens": 2}, "bbbb", False, "b", 3),
    (["b"], {"min_tokens": 3, "max_tokens": 4}, "bbbb", False, "bbb", 4),
    (["</s>"], {"min_tokens": 1, "ignore_eos": True}, "</s>a</s>", False, "a", 3),
    (["b", "bcd"], {"min_tokens": 1}, "bca", False, "bca", None),
    (["c", "bc"], {"min_tokens": 1}, "bca", False, "b", 2),  # of two that end at once the first of the list
    (["bc", "c"], {"min_tokens": 1}, "bca", False, "", 2),
]


@pytest.mark.parametrize(("stops", "sampling", "tokens", "ends_itself", "text", "stopped_after"), ANSWERS)
def test_text_of_an_answer(
    tokenizer: Tokenizer,
    stops: list[str],
    sampling: dict[str, Any],
    tokens: str,
    ends_itself: bool,
    text: str,
    stopped_after: int | None,
) -> None:
    units = [unit for unit in re.split("(</s>|.)", tokens) if unit]
    token_ids = [token_id for unit in units for token_id in tokenizer.encode(unit, add_special_tokens=False)]
    assert len(token_ids) == len(units)
    request = Request(
        request_id=0, prompt_token_ids=tokenizer.encode("The"), sampling=SamplingParams(**{"max_tokens": 9} | sampling)
    )
    answer = AnswerText(tokenizer, request, stops)
    shown, num_read = "", None
    for count, token_id in enumerate(token_ids, 1):
        shown += answer.push(token_id, is_end=ends_itself and count == len(token_ids))
        if answer.is_stopped:
            num_read = count
            break
    assert (shown if answer.is_stopped else shown + answer.flush()) == text
    assert num_read == stopped_after


@pytest.mark.parametrize(
    ("stops", "tokens", "ends_itself", "text"),
    [
        (["bc"], "abcd", False, "abc"),
        (["你好"], "a 你好 b", False, "a 你好"),  # in bytes
        (["b</s>"], "ab</s>", False, "ab"),
        ([], " river.", True, " river."),
        ([], " river</s>", True, " river"),
    ],
)
def test_what_ends_an_answer_is_shown_where_that_is_asked_for(
    tokenizer: Tokenizer, stops: list[str], tokens: str, ends_itself: bool, text: str
) -> None:
    token_ids = tokenizer.encode(tokens, add_special_tokens=False)
    request = Request(request_id=0, prompt_token_ids=tokenizer.encode("The"), sampling=SamplingParams(max_tokens=99))
    answer, shown = AnswerText(tokenizer, request, stops, shows_stop=True), ""
    for count, token_id in enumerate(token_ids, 1):
        shown += answer.push(token_id, is_end=ends_itself and count == len(token_ids))
        if answer.is_stopped:
            break
    assert (shown if answer.is_stopped else shown + answer.flush()) == text
    assert answer.is_stopped == bool(stops)


@pytest.mark.parametrize(("reason", "text"), [("stop", " river"), ("length", " river.")])
def test_the_text_of_a_sequence_that_has_ended(tokenizer: Tokenizer, reason: FinishReason, text: str) -> None:
    request = Request(request_id=0, prompt_token_ids=tokenizer.encode("The"), sampling=SamplingParams())
    token_ids = tokenizer.encode(" river.", add_special_tokens=False)
    assert answer_text(tokenizer, Sequence(request, output_token_ids=token_ids, finish_reason=reason)) == text


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
    shown = generate(tiny_server.grpc_url, model, stop_words=[stop], include_stop_str_in_output=True, **asked)
    assert shown.text == answer.text + stop
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
