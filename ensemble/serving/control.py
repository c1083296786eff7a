"""An operator's commands to the running scheduler: one request, one answer, msgpack over a socket in the run directory.

A command is a Struct, its answer too. The folder is its user's alone (mode 0700), so there is no other check.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, Union

import msgspec
import zmq

from ensemble.errors import DistServeError
from ensemble.serving.run_dir import control_address
from ensemble.threads import start_vital_thread

Answer = TypeVar("Answer", bound=msgspec.Struct)


class ControlError(DistServeError):
    """The scheduler does not answer, or refuses the command; the message says why."""

    code = "UNAVAILABLE"


class Command(msgspec.Struct, Generic[Answer], frozen=True, tag_field="command", forbid_unknown_fields=True):
    """Base of all commands; the class's name is the command's on the wire."""


class Load(msgspec.Struct, frozen=True):
    """What the scheduler has to do."""

    num_open: int  # requests whose last response has not been handed over
    is_draining: bool


class Status(Command[Load], frozen=True, tag=True):
    """Changes nothing."""


class Drain(Command[Load], frozen=True, tag=True):
    """New requests are refused from now on, running ones go on."""


class EndAll(Command[Load], frozen=True, tag=True):
    """Every running request ends with an error."""


class _Reply(msgspec.Struct):
    error: str | None
    answer: msgspec.Raw  # nil with an error


class ControlServer:
    """Answers commands one after the other, on a thread of its own, which calls their handlers."""

    def __init__(self, of_run: Path, handlers: Mapping[type[Command[Any]], Callable[[Any], msgspec.Struct]]) -> None:
        self._handlers = handlers
        self._decoder = msgspec.msgpack.Decoder(Union[tuple(handlers)])  # noqa: UP007
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.bind(control_address(of_run))
        self._thread = start_vital_thread(self._run, "control")

    def close(self) -> None:
        self._context.term()  # the thread closes its socket
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while True:
                self._socket.send(msgspec.msgpack.encode(self._reply(self._socket.recv())))
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def _reply(self, message: bytes) -> _Reply:
        try:
            command = self._decoder.decode(message)
            return _Reply(None, msgspec.Raw(msgspec.msgpack.encode(self._handlers[type(command)](command))))
        except (msgspec.DecodeError, DistServeError) as error:
            return _Reply(str(error), msgspec.Raw(msgspec.msgpack.encode(None)))


def call(of_run: Path, command: Command[Answer], answer: type[Answer], timeout_s: float) -> Answer:
    """Sends one command to the scheduler of a run. Raises ControlError."""
    with zmq.Context() as context, context.socket(zmq.REQ) as connection:
        connection.setsockopt(zmq.LINGER, 0)
        connection.connect(control_address(of_run))
        connection.send(msgspec.msgpack.encode(command))
        if not connection.poll(int(timeout_s * 1e3)):
            raise ControlError(f"the scheduler has not answered within {timeout_s:.1f} s")
        reply = msgspec.msgpack.decode(connection.recv(), type=_Reply)
    if reply.error is not None:
        raise ControlError(reply.error)
    return msgspec.msgpack.decode(reply.answer, type=answer)
