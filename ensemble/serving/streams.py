"""One client's answer: tokens to text, and to responses, as many tokens in each as have gathered (senders.py)."""

import contextlib
import threading
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ensemble.errors import DistServeError
from ensemble.request import FinishReason, TokenLogProbs
from ensemble.router.lives import Timeline
from ensemble.serving.answer_text import AnswerText
from ensemble.serving.client_request import ClientRequest
from ensemble.serving.log_probs import LogProbOutputs
from ensemble.serving.pacing import Pace
from ensemble.tokenizer import Tokenizer

# Of a response, by name. A paced one has a `response_handle`, [request_id, number]: by it is told that it has left.
Outputs = dict[str, npt.NDArray[Any]]


class ClientCall(Protocol):
    """The Triton request behind a stream, as the model shell offers it."""

    request_id: str  # as its client named it
    parameters: str  # the request's, as a JSON object

    def send(self, outputs: Outputs, final: bool) -> None: ...

    def send_error(self, error: DistServeError) -> None:
        """Sends the error as the final response."""
        ...

    def is_cancelled(self) -> bool: ...


class ClientStream:
    """One client's answer in the making. What it sends, and what it gets, is its sender thread's alone."""

    def __init__(
        self,
        call: ClientCall,
        client_request: ClientRequest,
        tokenizer: Tokenizer,
        arrival_ns: int,  # time.time_ns() at the front
        *,
        is_started: bool = True,  # else its sender is told when it may send (ensemble_calls.py)
        is_paced: bool = False,  # a response leaves when the last has been handed over (pacing.py)
        trace_parent: str = "",
    ) -> None:
        self._call = call
        self._call_lock = threading.Lock()
        self._is_closed = False  # the final response has been sent
        self.is_answered = False  # it is being sent, or has been: `answered` follows, or a failure to send
        self.timeline = Timeline(arrival_ns=arrival_ns)
        self.request = client_request.request
        self.hints = client_request.hints
        self.targets = client_request.targets
        self.client_id, self.trace_parent = call.request_id, trace_parent
        timeout_s = client_request.timeout_s
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._options = client_request.options
        self._choice = client_request.choice if client_request.num_choices > 1 else None
        self._log_probs = LogProbOutputs(client_request.options, tokenizer)
        self._tokenizer = tokenizer
        self._is_paced = is_paced
        self.pace = Pace()
        self._prompt_text = client_request.prompt_text
        shows_stop = client_request.options.include_stop_str_in_output
        self._answer_text = AnswerText(tokenizer, client_request.request, client_request.stop_strings, shows_stop)
        self._pending: list[tuple[int, TokenLogProbs | None]] = []
        self._finish_reason: FinishReason | None = None
        self._error: DistServeError | None = None
        self.is_started = is_started
        self.is_queued = self.is_resting = False  # at the sender
        self._previous_sent_ns = 0
        self.last_token_at: float | None = None  # by time.monotonic()
        self._is_first = True
        self._texts: list[str] = []  # not yet sent
        self._token_ids: list[int] = []  # not yet sent
        self.num_output_tokens = 0  # the router's count
        self.num_sent_tokens = 0  # those that the client's answer was made of

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def request_ids(self) -> list[int]:
        return [self.request_id]

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.prompt_len

    @property
    def is_closed(self) -> bool:
        """Whether the last response has been handed over."""
        return self._is_closed

    @property
    def finish_reason(self) -> FinishReason | None:
        """How an answered stream ended."""
        return "stop" if self._answer_text.is_stopped else self._finish_reason

    def push(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None = None) -> None:
        if not self._is_closed:  # else it came after a stop string
            self._pending.append((token_id, log_probs))
            self._finish_reason = finish_reason

    def fail(self, error: DistServeError) -> None:
        """Ends the stream with an error, which waits for nothing."""
        self._error = error

    @property
    def may_send(self) -> bool:
        if not self.is_started or self.is_resting:
            return False
        return self._error is not None or (bool(self._pending) and self.pace.is_clear)

    def is_cancelled(self) -> bool:
        """Asks the Triton server. Never beside or after the final response: the 24.10 server crashes on that."""
        with self._call_lock:
            return not self._is_closed and self._call.is_cancelled()

    def send_next(self) -> bool:
        """Sends all that is pending as one response, if it shows anything. Whether a response has left."""
        if self._is_closed:
            return False
        if self._error is not None:
            self._send_error(self._error)
            return True
        tokens, self._pending = self._pending, []
        has_all = self._finish_reason is not None
        num_read_before = len(self._token_ids)
        self._read([token_id for token_id, _ in tokens], has_all)
        for token_id, log_probs in tokens[: len(self._token_ids) - num_read_before]:  # up to a stop string
            if log_probs is not None:
                self._log_probs.add(token_id, log_probs)
        is_last = has_all or self._answer_text.is_stopped
        if is_last and not self.timeline.last_token_ns:  # the stop string came before the last token
            self.timeline.last_token_ns = time.time_ns()
        shows = is_last or (self._options.stream and (any(self._texts) or self._options.return_output_ids))
        if shows:
            outputs = self._outputs(is_last)
            if self._is_paced:
                outputs["response_handle"] = np.array([self.request_id, self.pace.leave(time.monotonic())], np.int64)
            self._send(outputs, is_last)
            now = time.time_ns()
            if self._previous_sent_ns:
                self.timeline.num_gaps += 1
                gap_s = (now - self._previous_sent_ns) / 1e9
                self.timeline.num_late_gaps += self.targets.itl_s is not None and gap_s > self.targets.itl_s
            self._previous_sent_ns = now
            self.timeline.first_sent_ns = self.timeline.first_sent_ns or now
            self.timeline.last_sent_ns = now if is_last else 0
            self._texts, self._token_ids, self._is_first = [], [], False
        return shows

    def _send(self, outputs: Outputs, is_last: bool) -> None:
        with self._call_lock:
            self.is_answered = is_last
            try:
                self._call.send(outputs, final=is_last)
            except Exception:
                self.is_answered = False
                raise
            self._is_closed = is_last

    def abort(self, error: DistServeError) -> None:
        """Ends the stream after a response that could not be sent; called on its sender thread."""
        if not self._is_closed:
            with contextlib.suppress(Exception):  # the server takes no answer any more
                self._send_error(error)

    def _send_error(self, error: DistServeError) -> None:
        with self._call_lock:
            self._is_closed = True
            self._call.send_error(error)

    def _read(self, token_ids: list[int], has_all: bool) -> None:
        """Tokens to text, up to a stop string; what comes after it is not counted."""
        ends_itself = has_all and self._finish_reason == "stop"
        for index, token_id in enumerate(token_ids, 1):
            self._token_ids.append(token_id)
            self.num_sent_tokens += 1
            self._texts.append(self._answer_text.push(token_id, ends_itself and index == len(token_ids)))
            if self._answer_text.is_stopped:
                return
        if has_all:
            self._texts.append(self._answer_text.flush())

    def _outputs(self, is_last: bool) -> Outputs:
        options, texts = self._options, self._texts
        if self._is_first and not options.exclude_input_in_output:
            prompt = self._prompt_text
            texts = [self._tokenizer.decode_prompt(self.request.prompt_token_ids) if prompt is None else prompt, *texts]
        outputs: Outputs = {"text_output": np.array(["".join(texts).encode()], dtype=object)}
        if options.return_finish_reason:
            until_done = "None" if options.return_vllm_outputs else ""
            reason = self.finish_reason if is_last else None
            outputs["finish_reason"] = np.array([(reason or until_done).encode()], dtype=object)
        # vllm_backend's counts are of another type, which an ensemble cannot change.
        prefix, count_type = ("vllm_", np.uint32) if options.return_vllm_outputs else ("", np.int32)
        if options.return_num_input_tokens:
            outputs[f"{prefix}num_input_tokens"] = np.array([self.request.prompt_len], count_type)
        if options.return_num_output_tokens:
            outputs[f"{prefix}num_output_tokens"] = np.array([len(self._token_ids)], count_type)
        if self._choice is not None:
            outputs["sequence_index"] = np.array([self._choice], np.int32)
        outputs |= self._log_probs.take()
        if options.return_output_ids:
            outputs["output_ids"] = np.array(self._token_ids, np.int32)
        if options.return_perf_metrics and is_last:
            outputs |= self._perf_metrics()
        return outputs

    def _perf_metrics(self) -> Outputs:
        timeline = self.timeline
        nanoseconds = {
            "arrival_time_ns": timeline.arrival_ns,
            "first_scheduled_time_ns": timeline.first_scheduled_ns,
            "predicted_first_token_time_ns": timeline.predicted_first_token_ns,
            "first_token_time_ns": timeline.first_token_ns,
            "decode_submitted_time_ns": timeline.decode_submitted_ns,
            "decode_joined_time_ns": timeline.decode_joined_ns,
            "last_token_time_ns": timeline.last_token_ns,
            "kv_transfer_time_ns": timeline.kv_transfer_ns,
            "kv_transfer_bytes": timeline.kv_transfer_bytes,
        }
        numbers = {
            "prefill_worker": timeline.prefill_replica,
            "decode_worker": timeline.decode_replica,
            "num_recoveries": timeline.num_recoveries,
        }
        return {name: np.array([value], np.int64) for name, value in nanoseconds.items()} | {
            name: np.array([value], np.int32) for name, value in numbers.items()
        }
