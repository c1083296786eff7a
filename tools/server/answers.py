"""Whether the processes that listen for HTTP go on: the Triton server, the relay and the OpenAI front are asked.

Only silence tells against one. For a process that stands still the kernel takes connections and requests, and nobody
answers; what is refused, closed or answered by an error shows one that goes on, or one that has ended.
"""

import socket
from typing import Final
from urllib.parse import urlsplit

from ensemble.replicas.progress import MAX_LATE_S

TRITON_SERVER, RELAY, OPENAI_FRONT = "Triton server", "HTTP relay", "OpenAI front"
MAX_SILENCE_S = {TRITON_SERVER: 30.0, RELAY: 15.0, OPENAI_FRONT: 15.0}
ASK_EVERY_S = 1.0
TRY_S = 5.0  # for an answer on one connection
MAX_READ_BYTES = 1 << 16


class AnswerWatch:
    """Asks whenever it is polled, which should be every 0.1 s, and does not wait. Time is an argument, in seconds.

    A process is judged from its first answer on, to this watcher or to another: until then it starts. One that has hung
    has, until another process is watched in its place.
    """

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}  # by its name
        self._reasons: dict[str, str] = {}  # of those that have hung
        self._looked_at = float("-inf")

    def watch(self, name: str, pid: int, url: str, now: float) -> None:
        """From now on the process of that name is this one. Its answer at the URL should depend on no other one."""
        if name in self._asked:
            self._asked[name].disconnect()
        self._asked[name] = _Asked(pid, url, now)
        self._reasons.pop(name, None)

    def all_have_answered(self) -> None:
        """Somebody else, where not this watcher: from now on silence tells against each."""
        for asked in self._asked.values():
            asked.has_answered = True

    def has_hung(self, name: str) -> bool:
        return name in self._reasons

    @property
    def waits(self) -> bool:
        """For an answer of one that has answered before: whoever asks it now may have to wait, too."""
        return any(asked.is_waited_for for asked in self._asked.values())

    def poll(self, now: float) -> str | None:
        """Why the server can serve no more.

        A watcher that was late itself does not judge: what stopped it may have stopped the others as well.
        """
        step_s = now - self._looked_at
        self._looked_at = now
        for name, asked in self._asked.items():
            asked.look(now, step_s)
            if asked.silent_s >= MAX_SILENCE_S[name]:
                what = f"the {name} (process {asked.pid}) has answered nothing for {asked.silent_s:.0f} s"
                self._reasons.setdefault(name, what)
        return next(iter(self._reasons.values()), None)

    def close(self) -> None:
        """The server waits for open connections when it stops."""
        for asked in self._asked.values():
            asked.disconnect()
        self._asked.clear()
        self._reasons.clear()


class _Asked:
    """The connection is kept: it tells also of a process that has no file left for another one."""

    def __init__(self, pid: int, url: str, now: float) -> None:
        parts = urlsplit(url)
        self.pid: Final = pid
        self.silent_s = 0.0  # since it was asked
        self.is_waited_for = False
        self.has_answered = False  # since it started
        self._address = (parts.hostname or "", parts.port or 0)
        self._question = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self._connection: socket.socket | None = None
        self._is_sent = False
        self._ask_at = now + ASK_EVERY_S
        self._try_until = self._ask_at + TRY_S

    def look(self, now: float, step_s: float) -> None:
        if now < self._ask_at:
            return
        self.silent_s = self.silent_s + step_s if self.has_answered and step_s <= MAX_LATE_S else 0.0
        try:
            is_heard = self._is_heard()
        except OSError:
            self.disconnect()
            is_heard = True
        self.is_waited_for = self.has_answered and not is_heard
        if is_heard:
            self._ask_later(now)
        elif now >= self._try_until:
            self.disconnect()
            self._try_until = now + TRY_S

    def _ask_later(self, now: float) -> None:
        self.silent_s = 0.0
        self._is_sent = False
        self._ask_at = now + ASK_EVERY_S
        self._try_until = self._ask_at + TRY_S

    def _is_heard(self) -> bool:
        """Whether something has come for the question, which is asked if it has not been. Raises OSError."""
        if self._connection is None:
            self._connection = begin_connection(self._address)
        try:
            if not self._is_sent:
                self._connection.sendall(self._question)
                self._is_sent = True
            if not self._connection.recv(MAX_READ_BYTES):
                raise ConnectionResetError
            self.has_answered = True
        except BlockingIOError:  # nothing has, or there is no connection yet
            return False
        return True

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._is_sent = False


def begin_connection(address: tuple[str, int]) -> socket.socket:
    """One that does not block, and may not be there yet. Raises OSError."""
    family, kind, protocol, _, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    connection = socket.socket(family, kind, protocol)
    connection.setblocking(False)
    connection.connect_ex(found)
    return connection
