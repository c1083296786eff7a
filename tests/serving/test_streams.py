"""A client's stream: every outcome ends it exactly once, and what is sent is what was generated."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ensemble.errors import Cancelled, DistServeError, InternalError
from ensemble.request import Request, SamplingParams
from ensemble.serving.cancels import HEARTBEAT_S, MAX_HEARTBEATS, heartbeats_due
from ensemble.serving.inputs import ClientRequest, OutputOptions
from ensemble.serving.marks import read_cancel_handle
from ensemble.serving.streams import MAX_TOKENS_PER_RESPONSE, ClientStream, Outputs, SenderPool
from ensemble.serving.window import LIMIT, STAMP_EVERY, Window
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import EOS_ID, make_tiny_tokenizer


class Recorder:
    """A Triton request that records its responses; sends fail while `failures` lasts."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.outputs: list[Outputs] = []
        self.errors: list[DistServeError] = []
        self.ended = threading.Event()

    def send(self, outputs: Outputs, final: bool) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the server refuses")
        assert not self.ended.is_set(), "a response after the final one"
        self.outputs.append(outputs)
        if final:
            self.ended.set()

    def send_error(self, error: DistServeError) -> None:
        assert not self.ended.is_set(), "a response after the final one"
        self.errors.append(error)
        self.ended.set()

    def request_id(self) -> str:
        return ""

    def parameters(self) -> str:
        return "{}"

    def is_cancelled(self) -> bool:
        assert not self.ended.is_set(), "asked after the final response"
        return False


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return Tokenizer.from_dir(path)


def make_stream(call: Recorder, tokenizer: Tokenizer, window: Window | None = None, **options: Any) -> ClientStream:
    """Of the ensemble, if it has a window."""
    request = Request(request_id=0, prompt_token_ids=[3], sampling=SamplingParams(max_tokens=100))
    client_request = ClientRequest(request, OutputOptions(**options), None)
    return ClientStream(call, client_request, tokenizer, time.time_ns(), window)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def make_pool(failed: list[Exception]) -> SenderPool:
    def on_failure(stream: ClientStream, error: Exception) -> None:
        failed.append(error)
        stream.abort(InternalError(str(error)))

    return SenderPool(lambda stream: None, on_failure)


def test_pending_tokens_are_sent_before_the_pool_closes(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    stream = make_stream(call, tokenizer, stream=True, return_output_ids=True)
    for token_id in range(100, 200):
        pool.push(stream, token_id, "length" if token_id == 199 else None)
    pool.close()
    assert call.ended.is_set()
    assert [int(i) for each in call.outputs for i in each["output_ids"]] == list(range(100, 200))
    assert all(1 <= len(each["output_ids"]) <= 8 for each in call.outputs)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_a_response_that_cannot_be_sent_ends_the_stream_with_an_error(tokenizer: Tokenizer, num_tokens: int) -> None:
    call, failed = Recorder(failures=1), []
    pool = make_pool(failed)
    stream = make_stream(call, tokenizer, stream=True)
    for index in range(num_tokens):
        pool.push(stream, 100 + index, "length" if index == num_tokens - 1 else None)
    assert call.ended.wait(10)
    pool.fail(stream, Cancelled("as the orchestrator does"))
    pool.close()
    assert len(failed) == 1
    assert [str(error) for error in call.errors] == ["internal error: the server refuses"]


@pytest.mark.parametrize("failures", [0, 1])
def test_a_stream_is_answered_unless_its_last_response_could_not_be_sent(tokenizer: Tokenizer, failures: int) -> None:
    """Whoever cancels an answered stream comes too late; one whose answer failed can only be cancelled."""
    call, pool = Recorder(failures=failures), make_pool([])
    stream = make_stream(call, tokenizer)
    assert not stream.is_answered
    pool.push(stream, 100, "length")
    assert call.ended.wait(10)
    pool.close()
    assert stream.is_answered == (failures == 0)


def test_a_stream_that_failed_sends_one_error(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    stream = make_stream(call, tokenizer, stream=True)
    pool.push(stream, 100, None)
    pool.fail(stream, Cancelled("gone"))
    pool.push(stream, 101, None)
    pool.close()
    assert [type(error) for error in call.errors] == [Cancelled]
    assert not stream.is_cancelled()


def test_a_heartbeat_is_the_handle_alone_and_never_follows_the_end(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    stream = make_stream(call, tokenizer, Window(), stream=True)
    stream.send_heartbeat()
    assert [list(each) for each in call.outputs] == [["cancel_handle"]]
    pool.push(stream, 100, "length")
    pool.close()
    stream.send_heartbeat()
    assert len(call.outputs) == 2


def test_heartbeats_have_a_bound_and_reach_every_stream_in_turn(tokenizer: Tokenizer) -> None:
    streams = [make_stream(Recorder(), tokenizer, Window()) for _ in range(3 * MAX_HEARTBEATS)]
    direct = make_stream(Recorder(), tokenizer)
    now = direct.last_handle + 2 * HEARTBEAT_S
    served = []
    for _ in range(3):
        batch = heartbeats_due([direct, *streams], now)
        assert len(batch) == MAX_HEARTBEATS
        served += batch
        for stream in batch:
            stream.last_handle = now
    assert set(served) == set(streams)
    assert heartbeats_due([direct, *streams], now) == []


def test_some_responses_carry_a_handle_and_none_of_a_client_that_came_directly(tokenizer: Tokenizer) -> None:
    calls = [Recorder(), Recorder()]
    window, pool = Window(), make_pool([])
    streams = [
        make_stream(calls[0], tokenizer, window, stream=True, return_output_ids=True),
        make_stream(calls[1], tokenizer, stream=True, return_output_ids=True),
    ]
    num_responses = 2 * STAMP_EVERY
    for index in range(num_responses):
        for call, stream in zip(calls, streams, strict=True):
            pool.push(stream, 100, "length" if index == num_responses - 1 else None)
            wait_until(lambda call=call, index=index: len(call.outputs) > index)  # type: ignore[misc]
    pool.close()
    carriers = [index for index, outputs in enumerate(calls[0].outputs) if "cancel_handle" in outputs]
    assert {STAMP_EVERY - 1, 2 * STAMP_EVERY - 1} <= set(carriers) and len(carriers) < num_responses
    handle = calls[0].outputs[STAMP_EVERY - 1]["cancel_handle"][0].decode()
    assert read_cancel_handle(handle) == (0, STAMP_EVERY)
    assert read_cancel_handle(handle.replace(f" {STAMP_EVERY}/", " 9/")) is None, "forged"
    assert not any("cancel_handle" in outputs for outputs in calls[1].outputs)
    assert window.num_inside == num_responses


def test_a_full_window_parks_its_streams_and_nobody_else(tokenizer: Tokenizer) -> None:
    """All on one sender thread: a client that came directly, and an error, pass by the stream that waits for room."""
    window, pool = Window(), SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1)
    options = {"stream": True, "return_output_ids": True}
    waiting, failing, direct = Recorder(), Recorder(), Recorder()
    through, doomed = (make_stream(call, tokenizer, window, **options) for call in (waiting, failing))
    past = make_stream(direct, tokenizer, **options)
    for _ in range(LIMIT):
        window.enter()
    for stream in (through, doomed, past):
        for token_id in range(100, 120):
            pool.push(stream, token_id, "length" if token_id == 119 else None)
    pool.fail(doomed, Cancelled("gone"))
    assert direct.ended.wait(10) and failing.ended.wait(10)
    assert waiting.outputs == [] and failing.outputs == []
    window.passed(LIMIT)
    assert waiting.ended.wait(10)
    pool.close()
    sent = [each["output_ids"].tolist() for each in waiting.outputs]
    assert [token_id for each in sent for token_id in each] == list(range(100, 120))
    assert max(map(len, sent)) == MAX_TOKENS_PER_RESPONSE, "they have gathered"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("with_text", [True, False])
def test_prompt_and_answer_are_one_text(tokenizer: Tokenizer, stream: bool, with_text: bool) -> None:
    """Also where the prompt ends within a character; the end token has no text, but counts and has its id."""
    token_ids = [*tokenizer.encode("The capital 你好 of Größe"), EOS_ID]
    for cut in range(1, len(token_ids)):
        text = tokenizer.decode(token_ids[:cut]) if with_text else None
        if text is not None and "\ufffd" in text:
            continue  # a text ends with a whole character
        call, pool = Recorder(), make_pool([])
        request = Request(request_id=0, prompt_token_ids=token_ids[:cut], sampling=SamplingParams(max_tokens=100))
        options = OutputOptions(stream=stream, exclude_input_in_output=False, return_output_ids=True)
        answer = ClientStream(call, ClientRequest(request, options, text), tokenizer, 0)
        for token_id in token_ids[cut:]:
            pool.push(answer, token_id, "stop" if token_id == EOS_ID else None)
        pool.close()
        sent = b"".join(each["text_output"][0] for each in call.outputs).decode()
        assert sent == tokenizer.decode(token_ids) == "The capital 你好 of Größe"
        assert [int(i) for each in call.outputs for i in each["output_ids"]] == token_ids[cut:]
        assert answer.finish_reason == "stop"


def test_an_end_token_that_is_not_special_has_no_text(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    stream = make_stream(call, tokenizer)
    *token_ids, last = tokenizer.encode("The river.", add_special_tokens=False)
    assert tokenizer.decode([last]) == "."
    for token_id in token_ids:
        pool.push(stream, token_id, None)
    pool.push(stream, last, "stop")
    pool.close()
    assert call.outputs[-1]["text_output"][0] == b"The river"


def test_a_length_limit_keeps_the_last_token_and_a_stop_string_at_it_counts(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("The river.", add_special_tokens=False)
    for stop_strings, text, reason in (((), "The river.", "length"), ((".",), "The river", "stop")):
        call, pool = Recorder(), make_pool([])
        request = Request(request_id=0, prompt_token_ids=[3], sampling=SamplingParams(max_tokens=len(token_ids)))
        client_request = ClientRequest(request, OutputOptions(return_finish_reason=True), None, stop_strings)
        stream = ClientStream(call, client_request, tokenizer, 0)
        for token_id in token_ids[:-1]:
            pool.push(stream, token_id, None)
        pool.push(stream, token_ids[-1], "length")
        pool.close()
        assert call.outputs[-1]["text_output"][0].decode() == text
        assert call.outputs[-1]["finish_reason"][0].decode() == reason
