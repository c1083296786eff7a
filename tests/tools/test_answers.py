"""A process that listens and answers nothing has hung, by a clock of the test's own; nothing else is taken for it."""

import contextlib
import itertools
import socket
from collections.abc import Iterator

import pytest

from ensemble.replicas.progress import MAX_LATE_S
from tools.server.answers import MAX_SILENCE_S, RELAY, TRITON_SERVER, AnswerWatch

LOOK_EVERY_S = 0.1
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Process:
    """Listens, as the kernel does also for one that stands still; and goes on only when it is told to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.questions = b""

    def go_on(self, answer: bytes = ANSWER, *, accepts: bool = True) -> None:
        if accepts:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.connections.append(self.listener.accept()[0])
        for connection in self.connections:
            with contextlib.suppress(OSError):  # nothing is there, or it is closed
                connection.setblocking(False)
                question = connection.recv(4096)
                self.questions += question
                if question and answer:
                    connection.send(answer)
                elif question:
                    connection.close()

    def close(self) -> None:
        for each in (self.listener, *self.connections):
            each.close()


class Watched:
    """The watch, and a clock that it alone goes by."""

    def __init__(self, name: str, port: int) -> None:
        self.watch = AnswerWatch()
        self.now = 1000.0
        self.name = name
        self.url = f"http://127.0.0.1:{port}/v2/health/live"
        self.begin(7)

    def begin(self, pid: int) -> None:
        self.watch.watch(self.name, pid, self.url, self.now)

    def looks(self, seconds: float, every_s: float = LOOK_EVERY_S) -> Iterator[str | None]:
        for _ in range(round(seconds / every_s)):
            self.now += every_s
            yield self.watch.poll(self.now)

    def hear_from(self, *processes: Process) -> None:
        for reason in self.looks(3.0):
            assert reason is None
            for process in processes:
                process.go_on()


@pytest.fixture
def process() -> Iterator[Process]:
    found = Process()
    yield found
    found.close()


@pytest.fixture(params=[TRITON_SERVER, RELAY])
def watched(request: pytest.FixtureRequest, process: Process) -> Iterator[Watched]:
    found = Watched(request.param, process.port)
    yield found
    found.watch.close()


def test_one_that_answers_nothing_has_hung_until_another_takes_its_place(watched: Watched, process: Process) -> None:
    watched.hear_from(process)
    assert not watched.watch.waits
    limit_s = MAX_SILENCE_S[watched.name]
    assert not any(watched.looks(1.0))
    for reason in watched.looks(limit_s - 2.0):
        assert reason is None
        assert watched.watch.waits
    *_, reason = watched.looks(3.0)
    assert reason == f"the {watched.name} (process 7) has answered nothing for {limit_s:.0f} s"
    assert watched.watch.has_hung(watched.name)
    assert watched.watch.waits
    process.go_on()
    assert set(watched.looks(5.0)) == {reason}, "what was said stays true until it is started again"
    watched.begin(8)
    for reason in watched.looks(2 * limit_s):
        process.go_on()
        assert reason is None
    assert not watched.watch.has_hung(watched.name)


def test_one_that_answers_late_has_not_hung(watched: Watched, process: Process) -> None:
    limit_s = MAX_SILENCE_S[watched.name]
    for count, reason in enumerate(watched.looks(5 * limit_s)):
        if count % round(0.8 * limit_s / LOOK_EVERY_S) == 0:
            process.go_on()
        assert reason is None
    assert len(process.connections) > 1, "one that has lost a connection is asked over another one"


def test_one_that_has_no_file_left_for_a_connection_is_heard_over_the_first(watched: Watched, process: Process) -> None:
    for count, reason in enumerate(watched.looks(3 * MAX_SILENCE_S[watched.name])):
        process.go_on(accepts=count < 20)
        assert reason is None
    assert len(process.connections) == 1
    assert process.questions.startswith(b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"x", b""], ids=["503", "x", "closed"])
def test_whatever_it_says_it_goes_on(watched: Watched, process: Process, answer: bytes) -> None:
    for reason in watched.looks(3 * MAX_SILENCE_S[watched.name]):
        process.go_on(answer)
        assert reason is None


def test_one_that_has_not_answered_yet_starts(watched: Watched) -> None:
    """The OpenAI front listens first, and reads its tokenizer then."""
    assert not any(watched.looks(3 * MAX_SILENCE_S[watched.name]))
    assert not watched.watch.waits


def test_one_that_has_answered_another_watcher_does_not_start(watched: Watched) -> None:
    """One that is stopped as soon as the server is ready: it would never be missed."""
    watched.watch.all_have_answered()
    *_, reason = watched.looks(MAX_SILENCE_S[watched.name] + 3.0)
    assert reason is not None and "has answered nothing for" in reason


def test_one_that_does_not_listen_has_ended_or_begins(watched: Watched, process: Process) -> None:
    watched.hear_from(process)
    process.close()
    assert not any(watched.looks(3 * MAX_SILENCE_S[watched.name]))


def test_a_watcher_that_stood_still_counts_anew(watched: Watched, process: Process) -> None:
    """As when a machine, a container or a shell's job is stopped, all processes with it, and goes on."""
    limit_s = MAX_SILENCE_S[watched.name]
    watched.hear_from(process)
    assert not any(watched.looks(limit_s - 1.0))
    watched.now += 3600.0
    assert not any(watched.looks(limit_s - 1.0))
    assert not any(watched.looks(10 * limit_s, every_s=MAX_LATE_S + 0.1)), "the machine goes on by fits and starts"
    assert any(watched.looks(limit_s + 2.0)), "and this process does not"


def test_each_is_judged_by_itself(process: Process) -> None:
    watched = Watched(RELAY, process.port)
    hung = Process()
    watched.watch.watch(TRITON_SERVER, 9, f"http://127.0.0.1:{hung.port}/v2/health/live", watched.now)
    watched.hear_from(process, hung)
    reasons = []
    for reason in watched.looks(2 * MAX_SILENCE_S[TRITON_SERVER]):
        process.go_on()
        reasons.append(reason)
    assert [reason for reason, _ in itertools.groupby(reasons)] == [
        None,
        "the Triton server (process 9) has answered nothing for 30 s",
    ]
    assert not watched.watch.has_hung(RELAY)
    watched.watch.close()
    hung.close()
