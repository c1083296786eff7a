"""Commands to the scheduler: typed both ways, and every wait has an end."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from ensemble.serving import control
from ensemble.serving.control import Command, ControlError, ControlServer, Drain, Load, Status
from ensemble.serving.run_dir import control_address


class Unknown(Command[Load], frozen=True, tag=True):
    pass


def refuse(command: object) -> Load:
    raise ControlError("not now")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    found = ControlServer(tmp_path, {Status: lambda command: Load(3, False), Drain: refuse})
    yield found
    found.close()


def test_answers_and_refusals(server: ControlServer, tmp_path: Path) -> None:
    assert control.call(tmp_path, Status(), Load, 5.0) == Load(3, False)
    with pytest.raises(ControlError, match="not now"):
        control.call(tmp_path, Drain(), Load, 5.0)
    with pytest.raises(ControlError, match="Unknown"):
        control.call(tmp_path, Unknown(), Load, 5.0)
    assert control.call(tmp_path, Status(), Load, 5.0) == Load(3, False)


def test_junk_is_answered_and_harms_nobody(server: ControlServer, tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as connection:
        connection.connect(control_address(tmp_path))
        for junk in (b"", b"\xc1", msgspec.msgpack.encode({"command": "Status", "more": 1})):
            connection.send(junk)
            assert connection.poll(5000)
            assert msgspec.msgpack.decode(connection.recv())["error"]
    assert control.call(tmp_path, Status(), Load, 5.0) == Load(3, False)


def test_a_scheduler_that_is_gone_does_not_keep_its_caller(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"not answered within 0\.2 s"):
        control.call(tmp_path, Status(), Load, 0.2)
