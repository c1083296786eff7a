"""Requests whose answers are known, since each has been served alone, and clients that send them over and over."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from tools.installation.server_files import ServerError
from tools.proofs.grpc_request import Answer, Inputs, ModelName, ask
from tools.proofs.http_request import ask_http
from tools.server.triton_server import TritonServer

REQUEST_TIMEOUT_S = 60.0
PAUSE_S = 0.1  # of a client whose request failed
SHORT_SILENCE_S = 0.3  # not worth keeping
COMPLETE, WENT_AWAY, REFUSED = "complete", "went away", "bad input refused"  # what may come of a request
FAILED, WRONG, HUNG, TAKEN = "FAILED", "WRONG", "HUNG", "BAD INPUT TAKEN"  # what may not


@dataclass(frozen=True, slots=True)
class Known:
    """A request, and what it gives."""

    inputs: Inputs
    output_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. Times by time.monotonic()."""

    verdict: str
    sent_at: float
    ended_at: float
    silences: Sequence[tuple[float, float]] = ()  # of a stream: from and to when nothing came; only long ones
    reason: str = ""  # of a failure
    decode_joined_ns: int = 0  # by time.time_ns(); 0: not told, or nothing was handed over
    copy_s: float = 0.0  # of its KV; 0: not told, or nothing was copied

    @property
    def is_fault(self) -> bool:
        return self.verdict.isupper()


def alone(server: TritonServer, inputs: Inputs) -> Known:
    """What the request gives when it is served alone. Raises ServerError."""
    answer = ask(server.grpc_url, inputs | {"return_output_ids": np.ones(1, bool)}, REQUEST_TIMEOUT_S)
    if answer.error is not None or not answer.has_ended:
        raise ServerError(f"served alone: {answer.error or 'no end'}")
    return Known(inputs, answer.output_ids, answer.text)


def judge(known: Known, answer: Answer, *, goes_away: bool = False, is_bad: bool = False) -> Outcome:
    """`goes_away`: its client, if it has not ended by then; `is_bad`: it must be refused, its max_tokens named."""
    verdict, reason = _verdict(known, answer, goes_away, is_bad)
    silences = [each for each in answer.silences if each[1] - each[0] > SHORT_SILENCE_S]
    return Outcome(
        verdict,
        answer.sent_at,
        answer.ended_at,
        silences if known.inputs["stream"][0] else (),
        reason,
        _last(answer, "decode_joined_time_ns"),
        _last(answer, "kv_transfer_time_ns") / 1e9,
    )


def _verdict(known: Known, answer: Answer, goes_away: bool, is_bad: bool) -> tuple[str, str]:
    if answer.error is not None:
        if is_bad and "max_tokens = -1" in answer.error:
            return REFUSED, ""
        return FAILED, answer.error[:200]
    if is_bad and answer.has_ended:
        return TAKEN, ""
    text, ids = answer.text, answer.output_ids if _has_ids(answer) else known.output_ids
    expected_text, expected_ids = known.text, known.output_ids
    if not answer.has_ended:
        if not goes_away:
            return HUNG, f"after {len(answer.responses)} responses"
        expected_text, ids_so_far = known.text[: len(text)], ids if _has_ids(answer) else []
        ids, expected_ids = ids_so_far, known.output_ids[: len(ids_so_far)]
    if ids != expected_ids:
        return WRONG, f"tokens {ids} not {expected_ids}"
    if text != expected_text:
        return WRONG, f"text {text!r} not {expected_text!r}"
    return (COMPLETE if answer.has_ended else WENT_AWAY), ""


def _has_ids(answer: Answer) -> bool:
    """The ensemble tells none."""
    return bool(answer.responses) and "output_ids" in answer.responses[0]


def _last(answer: Answer, name: str) -> int:
    values = [int(each[name][0]) for each in answer.responses if name in each]
    return values[-1] if values else 0


def make_inputs(rng: random.Random, vocab_size: int, max_prompt_len: int = 250, max_tokens: int = 250) -> Inputs:
    """A text or token ids, short or long; greedy or seeded; streamed or not; to its limit or to its end."""
    length = min(max_prompt_len, 1 + int(rng.paretovariate(1.1) * 8))
    inputs: Inputs = {
        "max_tokens": np.array([rng.randint(1, max_tokens)], np.int32),
        "temperature": np.array([rng.choice([0.0, 0.5, 1.0])], np.float32),  # exact in float32
        "seed": np.array([rng.getrandbits(63)], np.uint64),
        "ignore_eos": np.array([rng.random() < 0.8]),
        "stream": np.array([rng.random() < 0.7]),
    }
    if rng.random() < 0.5:
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ,.") for _ in range(length))
        return inputs | {"text_input": np.array([text.encode()], np.object_)}
    return inputs | {"input_ids": np.array([rng.randrange(vocab_size) for _ in range(length)], np.int32)}


def any_model(rng: random.Random, known: Known) -> ModelName:
    """One that takes this request."""
    return "ensemble" if "text_input" in known.inputs and rng.random() < 0.5 else "scheduler"


def send(server: TritonServer, inputs: Inputs, model: ModelName, over_http: bool, stay_s: float) -> Answer:
    """After `stay_s` the client goes away."""
    if model == "scheduler":
        inputs = inputs | {"return_output_ids": np.ones(1, bool), "return_perf_metrics": np.ones(1, bool)}
    if over_http:
        inputs = {name: np.array([a[0].decode()]) if a.dtype == np.object_ else a for name, a in inputs.items()}
        return ask_http(server.http_url, inputs, stay_s, model)
    return ask(server.grpc_url, inputs, stay_s, model)


class Load:
    """Clients, from entry to exit, each of which sends its next request when the last has ended."""

    def __init__(self, send_one: Callable[[random.Random], Outcome], num_clients: int) -> None:
        self._send_one = send_one
        self.outcomes: list[Outcome] = []  # appended by the clients' threads
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def verdicts(self) -> Counter[str]:
        return Counter(outcome.verdict for outcome in self.outcomes.copy())

    def first_served_after(self, moment: float) -> Outcome | None:
        """The first request that was sent after `moment` and has been served."""
        served = [each for each in self.outcomes.copy() if each.verdict == COMPLETE and each.sent_at > moment]
        return min(served, key=lambda each: each.ended_at, default=None)

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                outcome = self._send_one(rng)
            except Exception as error:  # of the client's library: no answer came
                outcome = Outcome(FAILED, begin, time.monotonic(), reason=repr(error))
            self.outcomes.append(outcome)
            if outcome.is_fault:
                self._stop.wait(PAUSE_S)
