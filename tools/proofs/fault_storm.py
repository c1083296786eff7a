"""Kills workers of a served model under load, at random moments, and judges what came of every request.

Clients send a few prompts over and over. What each prompt must give, whenever it is sent, is what it gave when it was
served alone. After a kill its requests must end soon, with an error that names the stage; all others as if nothing had
happened.
"""

import os
import random
import select
import signal
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from tools.benchmarks.results import at_least, at_most
from tools.proofs.gpu_smoke import greedy_inputs
from tools.proofs.grpc_request import ask
from tools.server.server_state import Metrics, workers
from tools.server.triton_server import TritonServer

StageName = Literal["prefill", "decode"]
REQUEST_TIMEOUT_S = 60.0
PAUSE_S = 0.1  # of a client that was refused
ERROR_GOAL_S, SERVICE_GOAL_S = 1.0, 10.0  # after a kill; the second without the time that a worker takes to load
HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request."""

    prompt: int  # its index
    sent_at: float  # time.monotonic(), as all times here
    ended_at: float
    output_ids: list[int]
    error: str | None
    copy_s: float  # of its KV; 0 where none was reported


@dataclass(slots=True)
class Kill:
    stage: StageName
    killed_at: float
    gone_s: float  # until the process had ended
    served_at: float | None = None  # end of the first request that was sent after the kill and served


def request(url: str, prompt: int, prompt_token_ids: list[int], max_tokens: int) -> Outcome:
    """One request on a stream of its own."""
    sent_at = time.monotonic()
    answer = ask(url, greedy_inputs(prompt_token_ids, max_tokens), REQUEST_TIMEOUT_S)
    copies_ns = [int(each["kv_transfer_time_ns"][0]) for each in answer.responses if "kv_transfer_time_ns" in each]
    error = answer.error if answer.has_ended else HUNG
    return Outcome(prompt, sent_at, answer.ended_at, answer.output_ids, error, sum(copies_ns[-1:]) / 1e9)


class Load:
    """Clients, from entry to exit, each of which sends its next request when the last has ended."""

    def __init__(self, url: str, prompts: list[list[int]], max_tokens: int, num_clients: int) -> None:
        self._url, self._prompts, self._max_tokens = url, prompts, max_tokens
        self.outcomes: list[Outcome] = []  # appended by the clients' threads
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(num_clients)]

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

    def first_served_after(self, moment: float) -> Outcome | None:
        """The first request that was sent after `moment` and has been served."""
        served = [each for each in self.outcomes.copy() if each.error is None and each.sent_at > moment]
        return min(served, key=lambda each: each.ended_at, default=None)

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            prompt = rng.randrange(len(self._prompts))
            outcome = request(self._url, prompt, self._prompts[prompt], self._max_tokens)
            self.outcomes.append(outcome)
            if outcome.error is not None:
                self._stop.wait(PAUSE_S)


def kill(server: TritonServer, stage: StageName) -> Kill:
    """Kills the stage's worker with SIGKILL, and waits until the process has ended."""
    [pid] = [process.pid for process in workers(server) if stage in process.cmdline()]
    ended = os.pidfd_open(pid)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    poller = select.poll()  # of descriptors of any number, as select is not
    poller.register(ended, select.POLLIN)
    poller.poll(REQUEST_TIMEOUT_S * 1e3)
    gone_s = time.monotonic() - killed_at
    os.close(ended)
    return Kill(stage, killed_at, gone_s)


def storm(server: TritonServer, load: Load, kills_of_each: int, rng: random.Random) -> list[Kill]:
    """Kills prefill and decode by turns, each time when requests sent since the last kill are served again."""
    kills: list[Kill] = []
    for stage in ("prefill", "decode") * kills_of_each:
        time.sleep(rng.uniform(0.5, 1.5))  # full load again, and a random moment
        kills.append(kill(server, stage))
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while (served := load.first_served_after(kills[-1].killed_at)) is None or not is_up(server):
            if time.monotonic() > deadline:
                return kills  # its served_at tells
            time.sleep(0.02)
        kills[-1].served_at = served.ended_at
    time.sleep(1.0)
    return kills


def is_up(server: TritonServer) -> bool:
    return len(workers(server)) == 2


def settled(server: TritonServer, timeout_s: float = 15.0) -> float:
    """Waits until no block is in use, and returns the number that are after all."""
    deadline = time.monotonic() + timeout_s
    while (left := Metrics(server).blocks_in_use) != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def storm_rows(
    kills: list[Kill], outcomes: list[Outcome], expected: list[list[int]], load_s: float
) -> list[dict[str, Any]]:
    """What the storm shows. `expected`: each prompt's output when it was served alone; `load_s`: a worker's start."""
    served = [each for each in outcomes if each.error is None]
    wrong = [each for each in served if each.output_ids != expected[each.prompt]]
    delays, faults = error_delays([each for each in outcomes if each.error not in (None, HUNG)], kills)
    num_hung = sum(each.error == HUNG for each in outcomes)
    # A request that ended well though its prefill worker, or one of the same time, was killed: decode had its KV.
    survivors = {
        id(each) for k in kills if k.stage == "prefill" for each in served if each.sent_at < k.killed_at < each.ended_at
    }
    back_s = [k.served_at - k.killed_at if k.served_at is not None else float("inf") for k in kills]
    what_was_wrong = [f"prompt {each.prompt}: {each.output_ids} not {expected[each.prompt]}" for each in wrong[:5]]
    service_goal_s = round(SERVICE_GOAL_S + load_s, 1)
    return [
        {"name": "workers killed", "value": len(kills), "unit": "kills"},
        {"name": "requests served", "value": len(served), "unit": "requests"},
        {"name": "requests ended by a kill, or refused after it", "value": len(delays), "unit": "requests"},
        at_most("requests hung", num_hung, "requests", 0),
        at_most("outputs that differ from the prompt's alone", len(wrong), "requests", 0) | {"seen": what_was_wrong},
        at_most("errors that are late, or not UNAVAILABLE of the killed stage", len(faults), "kinds", 0)
        | {"seen": sorted(faults)[:5]},
        at_most("kill to the last error of its requests", round(max(delays, default=0.0), 3), "s", ERROR_GOAL_S),
        at_most("kill to service", round(max(back_s, default=0.0), 1), "s", service_goal_s),
        at_least("requests that outlived a prefill worker", len(survivors), "requests", 1),
        {"name": "kill to the end of the process", "value": round(max(k.gone_s for k in kills), 3), "unit": "s"},
    ]


def error_delays(failed: list[Outcome], kills: list[Kill]) -> tuple[list[float], set[str]]:
    """Seconds from the kill (or, where it was sent later, from then) to each error; and the errors that are faults."""
    delays, faults = [], set()
    for each in failed:
        before = [k for k in kills if k.killed_at < each.ended_at]
        if not before:
            faults.add(f"before any kill: {each.error}")
            continue
        delay = each.ended_at - max(before[-1].killed_at, each.sent_at)
        delays.append(delay)
        if f"{before[-1].stage} is unavailable" not in str(each.error):
            faults.add(f"after a kill of {before[-1].stage}: {each.error}")
        elif delay > ERROR_GOAL_S:
            faults.add(f"{delay:.2f} s after a kill of {before[-1].stage}: {each.error}")
    return delays, faults
