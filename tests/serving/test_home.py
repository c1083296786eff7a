"""What a stage does with calls that come in any order, with replicas that come, go, die and hang, with a new router.

Its worker processes are real, but compute nothing (fake_worker.py).
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest

from ensemble.config import Deployment, StageName
from ensemble.errors import ConfigError, DistServeError
from ensemble.protocol.channel import Channel, Segment, decode_segment, encode_segment
from ensemble.protocol.router_replica import (
    AddReplica,
    FromReplica,
    FromStage,
    RemoveReplica,
    ReplicaDown,
    ReplicaUp,
    StartReplica,
    ToReplica,
    decode_from_stage,
    encode,
)
from ensemble.serving import home as home_module
from ensemble.serving.home import Home

DEADLINE_S = 60.0
StartHome = Callable[..., AbstractContextManager[Home]]


@pytest.fixture
def start_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartHome:
    program = tmp_path / "python3"
    worker = Path(__file__).parent / "fake_worker.py"
    program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {worker} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    @contextmanager
    def start(
        name: StageName = "decode", devices: tuple[str, ...] = ("cpu",), hang_timeout_s: float = 30
    ) -> Iterator[Home]:
        deployment = Deployment.parse(
            {
                "model": {"path": "/nowhere"},
                "prefill": {"devices": ["cpu", "cpu"]},
                "decode": {"devices": list(devices)},
                "hang_timeout_s": hang_timeout_s,
            }
        )
        home = Home(name, deployment)
        try:
            yield home
        finally:
            home.close()

    return start


class Router:
    """One run of the router, by hand: its calls, and what has come by their answers."""

    def __init__(self, home: Home, run: str = "run") -> None:
        self._home = home
        self.channel = Channel(run)
        self.items: list[FromStage] = []

    def call(self, segment: Segment | None = None) -> "queue.SimpleQueue[bytes | DistServeError]":
        """Makes a call; its answer will be in the queue."""
        answer: queue.SimpleQueue[bytes | DistServeError] = queue.SimpleQueue()
        self._home.handle(encode_segment(segment or self.channel.segment()), answer.put)
        return answer

    def receive(self, answer: "queue.SimpleQueue[bytes | DistServeError]") -> list[FromStage]:
        value = answer.get(timeout=DEADLINE_S)
        assert isinstance(value, bytes), value
        items = [decode_from_stage(item) for item in self.channel.receive(decode_segment(value))]
        self.items += items
        return items

    def send(self, *items: ToReplica | StartReplica | AddReplica | RemoveReplica) -> None:
        for item in items:
            self.channel.send(encode(item))

    def wait_for(self, kind: type[FromStage], count: int = 1) -> list[FromStage]:
        """Calls until that many new items of the kind have come; returns what came."""
        came: list[FromStage] = []
        while sum(isinstance(item, kind) for item in came) < count:
            came += self.receive(self.call())
        return came

    def up(self, count: int = 1) -> list[ReplicaUp]:
        return [item for item in self.wait_for(ReplicaUp, count) if isinstance(item, ReplicaUp)]

    def command(self, up: ReplicaUp, command: str, life: int | None = None) -> None:
        life = up.life if life is None else life
        self.send(ToReplica(replica=up.replica, life=life, command=msgspec.Raw(encode(command))))

    @property
    def events(self) -> list[str]:
        return [msgspec.msgpack.decode(item.event) for item in self.items if isinstance(item, FromReplica)]

    def wait_for_event(self, up: ReplicaUp, command: str) -> None:
        self.command(up, command)
        while not self.events or self.events[-1] != command:
            self.receive(self.call())


def has_exited(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_replicas_have_ids_of_their_own_and_pass_commands_and_events(start_home: StartHome) -> None:
    with start_home("decode", ("cpu", "cpu")) as home:
        home.wait_until_up()
        router = Router(home)
        ups = router.up(2)
        assert sorted((up.replica, up.life) for up in ups) == [(2, 0), (3, 0)], "after the two of prefill"
        for up in ups:
            router.command(up, f"for {up.replica}")
        router.wait_for(FromReplica, 2)
        assert {(item.replica, msgspec.msgpack.decode(item.event)) for item in router.items[2:]} == {
            (2, "for 2"),
            (3, "for 3"),
        }
        assert home.is_up


def test_prefills_replicas_are_the_first(start_home: StartHome) -> None:
    with start_home("prefill") as home:
        assert sorted(up.replica for up in Router(home).up(2)) == [0, 1]


@pytest.fixture(autouse=True)
def long_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine what a test does next takes longer than calls are parked."""
    monkeypatch.setattr("ensemble.serving.exchange.MAX_PARK_S", 1.0)


def test_two_calls_are_parked_and_an_older_one_answered_empty(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        router.up()
        oldest, *_ = [router.call() for _ in range(3)]
        assert router.receive(oldest) == []


def test_what_comes_of_a_command_comes_back_on_the_call_before_it(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        parked = router.call()
        router.command(up, "hello")
        commands = router.call()
        [event] = router.receive(parked)
        assert event == FromReplica(replica=up.replica, life=0, event=msgspec.Raw(encode("hello")))
        assert router.receive(commands) == [], (
            "it is still there for what comes next, and tells again only what is lost"
        )


def test_a_parked_call_is_answered_in_time_if_nothing_happens(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        router.up()
        assert router.receive(router.call()) == []


def test_calls_that_come_twice_or_overtake_each_other_do_no_harm(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        segments = []
        for number in range(4):
            router.command(up, f"{number}")
            segments.append(router.channel.segment())
        answers = [router.call(segments[index]) for index in (1, 3, 0, 3, 2, 1)]
        router.wait_for_event(up, "last")
        for answer in answers:
            router.receive(answer)
        assert router.events == ["0", "1", "2", "3", "last"]


def test_what_a_lost_answer_told_is_told_again(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        lost = router.call()
        assert decode_segment(lost.get(timeout=DEADLINE_S)).acknowledged == 0
        while True:  # loses every answer but the last, which tells of both
            answer = router.call().get(timeout=DEADLINE_S)
            items = decode_segment(answer).items
            if len(items) == 1 and not router.channel.num_unacknowledged:
                router.command(decode_from_stage(items[0]), "hello")
            if len(items) == 2:
                break
        router.items += map(decode_from_stage, router.channel.receive(decode_segment(answer)))
        assert [type(item) for item in router.items] == [ReplicaUp, FromReplica]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode({"first": 0}),
        encode_segment(Segment(run="run", first=9, items=[], more=False, acknowledged=0)),
        encode_segment(Segment(run="run", first=0, items=[], more=False, acknowledged=9)),
        encode_segment(Segment(run="another", first=1, items=[], more=False, acknowledged=0)),
        encode_segment(Segment(run="another", first=0, items=[], more=False, acknowledged=1)),
    ],
)
def test_a_call_that_cannot_be_is_refused_and_changes_nothing(start_home: StartHome, payload: bytes) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        parked = router.call()
        refused: queue.SimpleQueue[bytes | DistServeError] = queue.SimpleQueue()
        home.handle(payload, refused.put)
        error = refused.get(timeout=DEADLINE_S)
        assert isinstance(error, DistServeError) and error.code == "INTERNAL" and "decode: " in str(error)
        assert router.receive(parked) == []
        router.wait_for_event(up, "hello")
        assert router.items[0] == up and len(router.items) == 2


def test_an_item_that_cannot_be_read_harms_no_other(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        router.command(up, "before")
        for item in (b"", b"\xc1", encode({"type": "Nonsense"}), encode({"type": "ToReplica", "replica": "x"})):
            router.channel.send(item)
        router.send(StartReplica(replica=99), RemoveReplica(replica=99))
        router.command(up, "to another life", life=5)
        router.command(up, "after")
        router.wait_for(FromReplica, 2)
        assert router.events == ["before", "after"]


def test_an_event_that_cannot_be_read_comes_in_an_item_of_its_own(start_home: StartHome) -> None:
    """The exchange drops it; the segment and the other items are whole."""
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        router.command(up, "tell nonsense")
        router.command(up, "hello")
        items: list[bytes] = []
        while len(items) < 3:
            answer = router.call().get(timeout=DEADLINE_S)
            assert isinstance(answer, bytes)
            items += router.channel.receive(decode_segment(answer))
        with pytest.raises(msgspec.DecodeError):
            decode_from_stage(items[0])
        assert all(isinstance(decode_from_stage(item), FromReplica) for item in items[1:])


def test_what_a_worker_says_of_an_older_life_or_again_is_dropped(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        router.command(up, "come up again")
        router.command(up, "speak for the last life")
        router.wait_for_event(up, "hello")
        assert router.events == ["come up again", "speak for the last life", "hello"]
        assert router.items.count(up) == 1


def test_a_router_that_starts_anew_finds_replicas_in_new_lives(start_home: StartHome) -> None:
    with start_home("decode", ("cpu", "cpu")) as home:
        old = Router(home)
        old_ups = old.up(2)
        parked = old.call()
        new = Router(home, "new run")
        new_ups = new.up(2)
        error = parked.get(timeout=DEADLINE_S)
        assert isinstance(error, DistServeError) and error.code == "UNAVAILABLE"
        assert {(up.replica, up.life, up.pid) for up in new_ups} == {(up.replica, 1, up.pid) for up in old_ups}
        old.command(old_ups[0], "of the old run")
        refused = old.call().get(timeout=DEADLINE_S)
        assert isinstance(refused, DistServeError) and "run 'run' of the router has ended" in str(refused)
        new.command(new_ups[0], "to the old life", life=0)
        new.wait_for_event(new_ups[0], "hello")
        assert new.events == ["hello"], "neither the last words of the old lives, nor what was for them"


def test_a_killed_worker_is_told_of_and_started_again(start_home: StartHome, capfd: pytest.CaptureFixture[str]) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        os.kill(up.pid, signal.SIGKILL)
        [down] = router.wait_for(ReplicaDown)
        reason = f"worker process {up.pid} ended (killed by signal 9)"
        assert down == ReplicaDown(replica=2, life=0, reason=reason)
        assert has_exited(up.pid) and not home.is_up
        router.send(StartReplica(replica=2))
        [again] = router.up()
        assert (again.replica, again.life) == (2, 1) and again.pid != up.pid
        router.wait_for_event(again, "hello")
    assert f"distserve: decode replica 2: {reason}; next start in 0.5 s\n" in capfd.readouterr().err


def test_a_full_disk_costs_lines_of_the_log_and_no_replica(
    start_home: StartHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, start_home() as home:
        monkeypatch.setattr(sys, "stderr", full)
        router = Router(home)
        [up] = router.up()
        os.kill(up.pid, signal.SIGKILL)
        router.wait_for(ReplicaDown)
        router.send(StartReplica(replica=2))
        [again] = router.up()
        assert again.life == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_what_a_dying_worker_said_comes_before_its_end(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        for number in range(20):
            router.command(up, f"{number}")
        router.wait_for(FromReplica, 20)
        router.command(up, "exit")
        [down] = router.wait_for(ReplicaDown)
        assert isinstance(down, ReplicaDown) and "exit status 3" in down.reason


def test_a_stopped_worker_is_killed_and_told_of_when_it_has_exited(
    start_home: StartHome, capfd: pytest.CaptureFixture[str]
) -> None:
    with start_home("decode", ("cpu", "cpu"), hang_timeout_s=4) as home:
        router = Router(home)
        stopped, other = router.up(2)
        os.kill(stopped.pid, signal.SIGSTOP)
        [down] = router.wait_for(ReplicaDown)
        assert has_exited(stopped.pid)
        assert isinstance(down, ReplicaDown) and down.replica == stopped.replica
        assert re.fullmatch(rf"worker process {stopped.pid} made no progress for \d+\.\d s", down.reason)
        router.wait_for_event(other, "hello")
        router.send(StartReplica(replica=stopped.replica))
        assert router.up()[0].life == 1
    assert f"replica {stopped.replica}: {down.reason}; next start in" in capfd.readouterr().err


def test_a_worker_that_hangs_in_a_reset_is_found_too(start_home: StartHome) -> None:
    with start_home(hang_timeout_s=2) as home:
        [up] = Router(home).up()
        os.kill(up.pid, signal.SIGSTOP)
        new = Router(home, "new run")
        new.receive(new.call())
        [again] = new.up()
        assert again.life == 2 and has_exited(up.pid), "life 1 was never up"
        assert new.items == [again]


def test_a_worker_that_takes_no_commands_counts_as_hung(start_home: StartHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """A send must not wait for it: all other replicas of the stage would."""
    monkeypatch.setattr(home_module, "MAX_QUEUED_COMMANDS", 10)
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        router.command(up, "take no more commands")
        for _ in range(100):
            router.command(up, "x" * 100_000)
        [down] = router.wait_for(ReplicaDown)
        assert down == ReplicaDown(replica=2, life=0, reason=f"worker process {up.pid} took no commands")


def test_a_replica_is_added_and_removed(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [first] = router.up()
        router.send(AddReplica(replica=9, device="cpu"))
        [added] = router.up()
        assert (added.replica, added.life) == (9, 0)
        router.wait_for_event(added, "hello")
        router.send(AddReplica(replica=9, device="cpu"))  # which is there: nothing happens
        os.kill(added.pid, signal.SIGSTOP)
        router.send(RemoveReplica(replica=9))
        [down] = router.wait_for(ReplicaDown)
        assert down == ReplicaDown(replica=9, life=0, reason="it was removed", is_final=True)
        assert has_exited(added.pid)
        router.send(AddReplica(replica=9, device="cpu"))
        assert [(up.replica, up.life) for up in router.up()] == [(9, 1)]
        router.wait_for_event(first, "hello")


def test_a_replica_that_waits_for_its_next_start_is_removed(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        os.kill(up.pid, signal.SIGKILL)
        router.wait_for(ReplicaDown)
        router.send(RemoveReplica(replica=2))
        [down] = router.wait_for(ReplicaDown)
        assert down == ReplicaDown(replica=2, life=0, reason="it was removed", is_final=True)


@pytest.mark.parametrize(
    ("device", "reason"), [("cuda:7", "cuda:7: this machine has none"), ("cuda:8", "ended (exit status 3)")]
)
def test_an_added_replica_that_cannot_load_is_given_up(start_home: StartHome, device: str, reason: str) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        router.send(AddReplica(replica=9, device=device))
        [down] = router.wait_for(ReplicaDown)
        assert isinstance(down, ReplicaDown) and down.replica == 9 and down.is_final and down.reason.endswith(reason)
        router.wait_for_event(up, "hello")


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda:7", "cuda:7: this machine has none"), ("cuda:8", r"decode replica 3: .*exit status 3.* while loading")],
)
def test_a_stage_that_cannot_start_says_why(
    start_home: StartHome, capfd: pytest.CaptureFixture[str], device: str, reason: str
) -> None:
    with start_home("decode", ("cpu", device)) as home, pytest.raises(ConfigError, match=reason):
        home.wait_until_up()
    assert "distserve: error: " in capfd.readouterr().err


def test_a_closing_stage_answers_the_parked_call(start_home: StartHome) -> None:
    with start_home() as home:
        router = Router(home)
        [up] = router.up()
        parked = router.call()
    error = parked.get(timeout=DEADLINE_S)
    assert isinstance(error, DistServeError) and error.code == "UNAVAILABLE"
    assert has_exited(up.pid)


def test_a_fault_of_the_stages_thread_ends_the_process(start_home: StartHome) -> None:
    program = """
import threading
from ensemble.config import Deployment
from ensemble.serving.home import Home
Home._kill_the_hung = lambda self: {}["hung"]
deployment = {"model": {"path": "/nowhere"}, "mode": "colocated", "decode": {"devices": ["cpu"]}}
Home("decode", Deployment.parse(deployment))
threading.Event().wait()
"""
    with tempfile.TemporaryDirectory() as left_behind:
        environment = os.environ | {"TMPDIR": left_behind}
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
    assert ended.returncode == 1
    assert "distserve: error: thread decode-stage: KeyError: 'hung'" in ended.stderr
