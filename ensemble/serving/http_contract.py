"""What the HTTP relay puts right, as functions of bytes: requests as clients really write them, and answers' statuses.

The Triton server's HTTP front knows no wrong type (it says 500, and not where), takes numbers beyond 32 bits by their
lower half, and turns every error inside an ensemble into a 400.
"""

import contextlib
import json
import math
import re
import zlib
from typing import Any

import httptools
import msgspec

from ensemble.serving.fields import INTERNAL, KINDS, Kind, fits, flat, unknown
from ensemble.serving.http_messages import FRAMING, Refused, TooLarge, response

MAX_KEPT_BYTES = 1 << 20  # of a body that is kept until it is answered
MAX_ANSWER_BYTES = 64 << 10  # of one with an error
ABSOLUTE_FORM = re.compile(rb"([A-Z]+) https?://[^/ ]*(\S*) ", re.IGNORECASE)
ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
HOP_BY_HOP = re.compile(rb"(?im)^(?:upgrade|http2-settings):[^\n]*\n")
CONNECTION = re.compile(rb"(?im)^connection:([^\r\n]*)\r\n")
VERSION = re.compile(rb"[^\r\n]* HTTP/1\.([01])\r\n")
STREAMS = re.compile(rb'"stream"[ \t\r\n]*:[ \t\r\n\[]*true')
LONG_NUMBER = re.compile(rb"[0-9]{10}|[0-9][eE]")  # what may not fit into 32 bits
PACKED_NAMES = ("messages", *(name for name, kind in KINDS.items() if kind is Kind.OBJECT))  # inputs: strings of JSON
LISTS = (Kind.TEXTS, Kind.INTS, Kind.FLOATS)
LIST_NAMES = [name for name, kind in KINDS.items() if kind in LISTS]
IN_A_LIST = re.compile(rb"\[[ \t\r\n]*\[")
UNPACKED = re.compile(
    rb'"(?:(?:%b)"[ \t\r\n]*:[ \t\r\n]*[\[{]|(?:%b)"[ \t\r\n]*:[ \t\r\n]*%b)'
    % (b"|".join(map(str.encode, PACKED_NAMES)), b"|".join(map(str.encode, LIST_NAMES)), IN_A_LIST.pattern)
)
UINT64_NAMES = {"seed", "random_seed"}
IN_ENSEMBLE = re.compile(r"in ensemble '[^']*', ")
RETRY_AFTER = re.compile(r"retry after ([0-9.]+) s")
STATUSES = (  # of messages, as errors.py begins them
    (re.compile(r"overloaded: "), 503),
    (re.compile(r"\w+ is unavailable: "), 503),
    (re.compile(r".*Stub process .* is not healthy", re.DOTALL), 503),
    (re.compile(r"deadline exceeded: "), 504),
    (re.compile(r"the client cancelled "), 499),
    (re.compile(r"internal error: "), 500),
)
OF_THE_PARSER = re.compile(
    r"(?:Unable to parse|failed to parse the request JSON|attempt to (?:get|access)|Expected JSON object"
    r"|Converting keyword|parameter '.*' has invalid type)",
    re.DOTALL,
)


def as_plain_request(head: bytes) -> bytes:
    """The head without an offer to upgrade, which nobody takes up, its target in origin-form. Raises Refused."""
    if b" HTTP/" in head and not VERSION.match(head):
        version = head.partition(b"\r\n")[0].rpartition(b" HTTP/")[2].decode(errors="replace")
        raise Refused(505, f"HTTP/{version} is not served here: send HTTP/1.1, or use the gRPC port")
    found = ABSOLUTE_FORM.match(head)
    if found is not None:
        head = b"%b %b " % (found[1], found[2] or b"/") + head[found.end() :]
    line, _, _ = head.partition(b"\r\n")
    if b"%" in line:
        head = ESCAPED.sub(_unescaped, line) + head[len(line) :]
    without = HOP_BY_HOP.sub(b"", head)
    if without is head or without == head:
        return head
    return CONNECTION.sub(_without_upgrade, without)


def _unescaped(escaped: "re.Match[bytes]") -> bytes:
    """A character that needs no escape, and means the same without it."""
    char = bytes.fromhex(escaped[1].decode())
    return char if char.isalnum() or char in b"-._~" else escaped[0]


def _without_upgrade(connection: "re.Match[bytes]") -> bytes:
    options = [option.strip() for option in connection[1].split(b",")]
    kept = [option for option in options if option.lower() not in (b"upgrade", b"http2-settings")]
    return b"Connection: %b\r\n" % b", ".join(kept) if kept else b""


def decode(body: bytes, encoding: bytes, limit: int) -> bytes:
    """A compressed body, of at most `limit` bytes then. Raises Refused."""
    name = encoding.decode(errors="replace").strip().lower()
    if name not in ("gzip", "x-gzip", "deflate"):
        raise Refused(415, f"Content-Encoding {name!r} is not taken: gzip, deflate or none")
    # Who says deflate may send it bare: zlib's first byte says a method, 8, of which no bare stream can begin.
    is_bare = name == "deflate" and body[:1] not in (b"", b"\x1f") and body[0] & 0x0F != 8
    decoder = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
    try:
        decoded = decoder.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(400, f"the body is not {name}: {error}") from None
    if len(decoded) > limit:
        raise TooLarge(limit)
    if not decoder.eof:
        raise Refused(400, f"the body is not {name}: it ends in its midst")
    return decoded


def with_packed_objects(body: bytes) -> bytes:
    """The JSON body of a `generate` with `messages` and objects as the strings that the Triton server takes, and the
    only row of a list of one, which is what clients make of a shape [1, n], in its place."""
    if not UNPACKED.search(body):
        return body
    try:
        return _packed(body, ("parameters",))
    except (ValueError, RecursionError):  # of both libraries, and of text that is no UTF-8
        return body  # the Triton server refuses it


def _packed(body: bytes, inner: tuple[str, ...] = ()) -> bytes:
    """An object whose members are as they were written, but for those to be packed; so in the `inner` objects."""
    members = []
    for name, value in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items():
        raw = bytes(value)
        if name in PACKED_NAMES and _is_unpacked(raw):
            raw = json.dumps(raw.decode()).encode()
        elif name in LIST_NAMES and IN_A_LIST.match(raw):
            rows = msgspec.json.decode(raw, type=list[msgspec.Raw])
            raw = bytes(rows[0]) if len(rows) == 1 else raw
        elif name in inner and raw.startswith(b"{"):
            raw = _packed(raw)
        members.append(json.dumps(name).encode() + b":" + raw)
    return b"{" + b",".join(members) + b"}"


def _is_unpacked(raw: bytes) -> bool:
    """An object, or a list of other things than the strings that an input may be."""
    if not raw.startswith(b"["):
        return raw.startswith(b"{")
    elements = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return not all(bytes(element).startswith(b'"') for element in elements)


def is_of_http_1_0(head: bytes) -> bool:
    found = VERSION.match(head)
    return found is not None and found[1] == b"0"


def asks_to_stream(body: bytes) -> bool:
    """Whether the JSON body of a `generate` says so, where it may."""
    if not STREAMS.search(body):
        return False
    try:
        members = json.loads(body)
    except (ValueError, RecursionError):
        return False
    parameters = members.get("parameters") if isinstance(members, dict) else None
    found = [of_names.get("stream") for of_names in (members, parameters) if isinstance(of_names, dict)]
    return any(True in flat([value]) for value in found)


def fault_of(body: bytes) -> str | None:
    """What the Triton server takes wrongly, or refuses without saying what, in the JSON body of a `generate`."""
    try:
        members = json.loads(body)
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return f"the body is not JSON: {error}"
    if not isinstance(members, dict):
        return "the body is not a JSON object"
    parameters = members.pop("parameters", {})
    if not isinstance(parameters, dict):
        return "parameters is not valid: a JSON object"
    for name, value in [*members.items(), *parameters.items()]:
        fault = _fault_of_member(name, value)
        if fault is not None:
            return fault
    return None


def _fault_of_member(name: str, value: Any) -> str | None:
    if name == "id":
        return None if isinstance(value, str) else f"id = {_shown(value)} is not valid: a string"
    if name not in KINDS or name in INTERNAL:
        is_parameter = isinstance(value, str | int | bool)
        return None if is_parameter else str(unknown(name, value, KINDS))
    kind = KINDS[name]
    is_several = kind in LISTS and isinstance(value, list) and any(isinstance(each, list) for each in value)
    if is_several or not fits(kind, value):
        kind_of_json = "a string of JSON" if kind is Kind.OBJECT else kind.value
        return f"{name} = {_shown(value)} is not valid: {kind_of_json}"
    for element in value if isinstance(value, list) else [value]:
        if kind in (Kind.INT, Kind.INTS) and isinstance(element, int):
            low, high = (0, 1 << 64) if name in UINT64_NAMES else (-(1 << 31), 1 << 31)
            if not low <= element < high:
                bits = 64 if name in UINT64_NAMES else 32
                return f"{name} = {_shown(element)} is not valid: an integer of {bits} bits"
        if kind in (Kind.FLOAT, Kind.FLOATS) and isinstance(element, int | float) and not _is_float32(element):
            return f"{name} = {_shown(element)} is not valid: a finite number of 32 bits"
    return None


def _is_float32(value: float) -> bool:
    try:
        return math.isfinite(value) and abs(float(value)) <= 3.4e38
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


class AnswerInspector:
    """Follows the answer to one `generate`, by a parser, which calls what begins with `on_`.

    An error is held until it is whole, and put right. Clients of HTTP/1.0, who know no chunks, get what is in them.
    """

    def __init__(self, request_body: bytes | None, to_http_1_0: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._request_body = request_body
        self._is_to_http_1_0 = to_http_1_0
        self._is_held = True  # its head has not come, or is an error's
        self._has_ended = False
        self._status = 0
        self._headers: list[bytes] = []  # but for those of the framing
        self._head = self._body = b""  # what was not passed on, without chunks
        self.held = b""  # the same, as it came
        self.ends_by_closing = False  # the client has nothing else to tell the end by
        self.is_done = False  # what else comes passes as it is

    def push(self, data: bytes) -> bytes:
        """What to pass on now."""
        self.held += data
        with contextlib.suppress(httptools.HttpParserError):  # then it ends when the server closes
            self._parser.feed_data(data)
        if self._is_held and self._has_ended:
            self.ends_by_closing = False
            passed = amended(self._status, self._headers, self._body, self._request_body)
        elif self._is_held and len(self.held) <= MAX_ANSWER_BYTES:
            return b""
        else:
            self._is_held = False
            passed = self._head + self._body if self.ends_by_closing else self.held
            self.held = self._head = self._body = b""
        self.is_done = self._has_ended or not self.ends_by_closing
        if self.is_done:
            del self._parser  # which refers to this
        return passed

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"transfer-encoding":
            self.ends_by_closing = self._is_to_http_1_0
        if name.lower() not in FRAMING:
            self._headers.append(b"%b: %b" % (name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._is_held = not 200 <= self._status < 400  # an interim answer goes with what follows
        kept = [line for line in self._headers if not line.lower().startswith(b"connection:")]
        self._head = b"\r\n".join([self.held.partition(b"\r\n")[0], *kept, b"Connection: close", b"", b""])

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self._has_ended = self._status >= 200


def amended(status: int, headers: list[bytes], body: bytes, request_body: bytes | None) -> bytes:
    """The answer with the status that its message has, and with the field where the server did not name it."""
    prefix = b"data: " if body.startswith(b"data: ") else b""
    try:
        message = str(json.loads(body[len(prefix) :])["error"])
    except (ValueError, KeyError, TypeError):
        return response(status, headers, body)
    plain = IN_ENSEMBLE.sub("", message, count=1)
    if OF_THE_PARSER.match(plain):
        fault = fault_of(request_body) if request_body is not None else None
        status, body = 400, prefix + json.dumps({"error": fault or message}).encode() + (b"\n\n" if prefix else b"")
    else:
        status = next((found for pattern, found in STATUSES if pattern.match(plain)), status)
    if status == 503 and not any(line.lower().startswith(b"retry-after:") for line in headers):
        seconds = RETRY_AFTER.search(plain)
        headers = [*headers, b"Retry-After: %d" % max(1, math.ceil(float(seconds[1])) if seconds else 1)]
    return response(status, headers, body)
