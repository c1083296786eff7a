"""A client's stream: every outcome ends it exactly once, and what is sent is what was generated."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ensemble.errors import Cancelled, DistServeError, InternalError
from ensemble.request import Request, SamplingParams
from ensemble.serving.cancels import CHECK_INTERVAL_S
from ensemble.serving.client_request import ClientRequest, OutputOptions
from ensemble.serving.handover import ResponseHandle
from ensemble.serving.pacing import PATIENCE_S
from ensemble.serving.senders import SenderPool
from ensemble.serving.streams import ClientStream, Outputs
from ensemble.tokenizer import Tokenizer
from tests.checkpoints import EOS_ID, make_tiny_tokenizer


class Recorder:
    """A Triton request that records its responses; sends fail while `failures` lasts."""

    request_id, parameters = "", "{}"

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

    def end(self) -> None:
        assert not self.ended.is_set(), "a second end"
        self.ended.set()

    def is_cancelled(self) -> bool:
        assert not self.ended.is_set(), "asked after the final response"
        return False


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return Tokenizer.from_dir(path)


def make_stream(
    call: Recorder,
    tokenizer: Tokenizer,
    request_id: int = 0,
    is_paced: bool = False,
    **options: Any,
) -> ClientStream:
    request = Request(request_id=request_id, prompt_token_ids=[3], sampling=SamplingParams(max_tokens=100))
    client_request = ClientRequest(request, OutputOptions(**options), None)
    return ClientStream(call, client_request, tokenizer, time.time_ns(), is_paced=is_paced)


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
    assert len(call.outputs) == 1, "one hand-over"


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_a_response_that_cannot_be_sent_ends_the_stream_with_an_error(tokenizer: Tokenizer, num_tokens: int) -> None:
    call, failed = Recorder(failures=1), []
    pool = make_pool(failed)
    stream = make_stream(call, tokenizer, stream=True)
    for index in range(num_tokens):
        pool.push(stream, 100 + index, "length" if index == num_tokens - 1 else None)
    pool.flush()
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
    pool.flush()
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


def handles(call: Recorder) -> list[ResponseHandle]:
    return [ResponseHandle(*outputs["response_handle"].tolist()) for outputs in call.outputs]


def test_one_response_of_a_stream_is_on_its_way_and_tokens_gather_behind_it(tokenizer: Tokenizer) -> None:
    """All on one sender thread: other streams, and a client that came directly, pass by the one that waits."""
    pool = SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1)
    options = {"stream": True, "return_output_ids": True}
    calls = [Recorder() for _ in range(4)]
    waiting, doomed, other = (
        make_stream(calls[index], tokenizer, is_paced=True, request_id=index, **options) for index in range(3)
    )
    direct = make_stream(calls[3], tokenizer, request_id=3, **options)
    for token_id in range(100, 120):
        for stream in (waiting, doomed, other, direct):
            pool.push(stream, token_id, "length" if token_id == 119 else None)
        pool.flush()
        wait_until(lambda count=token_id - 99: len(calls[3].outputs) == count)  # type: ignore[misc]
        pool.passed([(2, token_id - 99)])
        wait_until(lambda: len(calls[2].outputs) > 0)
    assert calls[2].ended.wait(10) and calls[3].ended.wait(10)
    assert [each["output_ids"].tolist() for each in calls[0].outputs] == [[100]]
    pool.fail(doomed, Cancelled("an error waits for nothing"))
    assert calls[1].ended.wait(10)
    pool.passed([(0, 2), (17, 1)])  # never given: of no stream, or of no response
    pool.passed([(0, 1)])
    assert calls[0].ended.wait(10)
    pool.close()
    assert [each["output_ids"].tolist() for each in calls[0].outputs] == [[100], list(range(101, 120))]
    assert [(handle.request_id, handle.number) for handle in handles(calls[0])] == [(0, 1), (0, 2)]
    assert not any("response_handle" in outputs for outputs in calls[3].outputs)


def test_a_lost_number_costs_a_stream_less_than_a_second(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    stream = make_stream(call, tokenizer, is_paced=True, stream=True, return_output_ids=True)
    pool.push(stream, 100, None)
    pool.flush()
    wait_until(lambda: len(call.outputs) == 1)
    pool.push(stream, 101, "length")
    pool.flush()
    pool.give_up_lost()
    assert PATIENCE_S + CHECK_INTERVAL_S < 1
    assert not call.ended.wait(0.05)
    started = time.monotonic()
    while not call.ended.wait(CHECK_INTERVAL_S):
        pool.give_up_lost()
        assert time.monotonic() < started + 10
    pool.close()
    assert [each["output_ids"].tolist() for each in call.outputs] == [[100], [101]]


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


def test_many_streams_together_send_no_more_than_the_machine_carries(tokenizer: Tokenizer) -> None:
    """Their tokens gather."""
    pool = SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1, max_responses_per_s=100)
    calls = [Recorder() for _ in range(20)]
    streams = [
        make_stream(call, tokenizer, request_id=index, stream=True, return_output_ids=True)
        for index, call in enumerate(calls)
    ]
    started, count = time.monotonic(), 0
    while time.monotonic() < started + 1.0:
        for stream in streams:
            pool.push(stream, 100 + count % 200, None)
        pool.flush()
        count += 1
        time.sleep(0.005)
    num_responses, seconds = sum(len(call.outputs) for call in calls), time.monotonic() - started
    for stream in streams:
        pool.push(stream, 99, "length")
    pool.flush()
    assert all(call.ended.wait(10) for call in calls)
    assert 20 + 40 * 0.005 * count <= num_responses <= 20 + 110 * seconds
    assert max(len(call.outputs) for call in calls) <= 2 + min(len(call.outputs) for call in calls), "by turns"
    expected = [100 + index % 200 for index in range(count)] + [99]
    for call in calls:
        assert [int(i) for each in call.outputs for i in each["output_ids"]] == expected
    pool.close()


def test_a_stream_that_is_alone_hardly_rests(tokenizer: Tokenizer) -> None:
    pool = SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1, max_responses_per_s=100)
    call = Recorder()
    alone = make_stream(call, tokenizer, stream=True, return_output_ids=True)
    start = time.monotonic()
    for index in range(20):
        pool.push(alone, 100 + index, "length" if index == 19 else None)
        pool.flush()
        wait_until(lambda num_sent=index + 1: len(call.outputs) == num_sent)
    assert time.monotonic() - start < 5.0, "10 ms of rest each"
    pool.close()


def test_a_streams_end_waits_for_no_rest(tokenizer: Tokenizer) -> None:
    pool = SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1, max_responses_per_s=0.01)
    call = Recorder()
    stream = make_stream(call, tokenizer, stream=True, return_output_ids=True)
    for finish_reason in (None, "length"):
        pool.push(stream, 100, finish_reason)
        pool.flush()
        wait_until(lambda: bool(call.outputs))
    assert call.ended.wait(10)
    pool.close()


def test_who_sends_nothing_does_not_make_others_rest(tokenizer: Tokenizer) -> None:
    pool = SenderPool(lambda stream: None, lambda stream, error: None, num_threads=1, max_responses_per_s=100)
    silent = [make_stream(Recorder(), tokenizer, request_id=index) for index in range(1, 50)]
    call = Recorder()
    streaming = make_stream(call, tokenizer, stream=True, return_output_ids=True)
    start = time.monotonic()
    for index in range(20):
        for stream in [*silent, streaming]:
            pool.push(stream, 100 + index, "length" if index == 19 else None)
        pool.flush()
        wait_until(lambda num_sent=index + 1: len(call.outputs) == num_sent)
    assert time.monotonic() - start < 5.0, "for 50 streams each response but the first would rest half a second"
    pool.close()


def test_a_stream_of_the_ensemble_sends_nothing_before_it_is_told_to(tokenizer: Tokenizer) -> None:
    call, pool = Recorder(), make_pool([])
    request = Request(request_id=0, prompt_token_ids=[3], sampling=SamplingParams(max_tokens=100))
    options = OutputOptions(stream=True, return_output_ids=True)
    stream = ClientStream(call, ClientRequest(request, options, None), tokenizer, 0, is_started=False)
    for token_id in (100, 101):
        pool.push(stream, token_id, None)
        pool.flush()
    pool.fail(stream, Cancelled("an error waits too"))
    assert not call.ended.wait(0.05)
    assert not call.outputs
    pool.start([stream])
    pool.close()
    assert [type(error) for error in call.errors] == [Cancelled]
