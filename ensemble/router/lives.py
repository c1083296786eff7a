"""One record for each live request: what was asked, what the client has of it, and where it is.

    queued --> prefill --> bridge --> decode --> answering --> ended        (an only token: prefill --> answering)
       ^          |          |          |
       +----------+----------+----------+   its replica was lost, or drained, or gave it up: prefilled again,
                                                from prompt and outputs

The record is the only commit point. A token is taken if it is of the present attempt and at the record's length; what
is computed again starts from the committed tokens, as an attempt with an id of its own.

A token that is held is committed all the same: only its delivery waits, until the sequence has joined decode, or a
token comes that is not held.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from ensemble.errors import DistServeError, InternalError
from ensemble.protocol.router_replica import KVHandoff
from ensemble.request import FinishReason, Request, TokenLogProbs
from ensemble.scheduling.deadlines import Deadlines
from ensemble.scheduling.policies import Hints

Phase = Literal["queued", "prefill", "bridge", "decode", "answering"]
TOKENS_OF_PROGRESS = 16  # an attempt that has got on by so many was not ended by what the request itself does


@dataclass(slots=True, eq=False)
class Timeline:
    """When a request passed each point, in nanoseconds of time.time_ns(); 0 until it has.

    Its hand-off is the one after which it began to decode: what moves it later, or computes it again, is decode, too.
    """

    arrival_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    decode_submitted_ns: int = 0
    decode_joined_ns: int = 0
    last_token_ns: int = 0
    first_sent_ns: int = 0  # the first and the last response have been handed over
    last_sent_ns: int = 0
    kv_transfer_ns: int = 0  # the copy itself
    kv_transfer_bytes: int = 0
    predicted_first_token_ns: int = 0  # when it was to be ready to send, as predicted when the prompt was started first
    prefill_replica: int = -1
    decode_replica: int = -1  # -1: ended with its first token
    num_gaps: int = 0  # between responses of a stream
    num_late_gaps: int = 0  # of them longer than its ITL target
    num_recoveries: int = 0  # attempts because of what befell its replicas
    num_preemptions: int = 0  # attempts because it was given up for others


class Output(NamedTuple):
    """A token, with what comes with it."""

    token_id: int
    finish_reason: FinishReason | None
    log_probs: TokenLogProbs | None


class Client(Protocol):
    """Whoever waits for the answer."""

    @property
    def timeline(self) -> Timeline: ...

    @property
    def hints(self) -> Hints: ...

    @property
    def deadline(self) -> float | None:
        """By time.monotonic()."""

    @property
    def is_answered(self) -> bool:
        """The last response is being sent, or has been."""

    def take(self, token_id: int, finish_reason: FinishReason | None, log_probs: TokenLogProbs | None) -> None:
        """Gets the next token, once. Never waits."""

    def fail(self, error: DistServeError) -> None:
        """The request has ended with this error. Never waits."""

    def ended(self) -> None:
        """The request has ended with its last response."""


@dataclass(slots=True, eq=False)
class Life:
    request: Request  # as it was asked
    client: Client
    attempt: Request  # as it is computed now; its id is the attempt's
    arrived_s: float = 0.0  # by time.monotonic()
    phase: Phase = "queued"
    output_token_ids: list[int] = field(default_factory=list)  # committed: the client has them, or will
    held: list[Output] = field(default_factory=list)  # the last of them, which the client has not been given
    prefill_replica: int | None = None  # of this attempt
    decode_replica: int | None = None  # of this attempt
    handoff: KVHandoff | None = None  # while it is in the bridge
    moves_to: int | None = None  # a replica to which it was told to go, while it decodes; until it has left
    submitted_s: float = 0.0  # to where it is, or asked in vain to go over; by time.monotonic()
    hashes: list[bytes] = field(default_factory=list)  # of the blocks to prefill, where there is a prefix cache
    sharing: list[int] = field(default_factory=list)  # request ids that wait for this one to compute their prompt
    num_deaths: int = 0  # of replicas that had it, in a row
    num_alone_deaths: int = 0
    num_failed_pulls: int = 0
    has_decoded: bool = False  # in any attempt
    is_alone: bool = False  # suspected of those deaths: it runs with no other beside it

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def attempt_id(self) -> int:
        return self.attempt.request_id

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and committed. The last one has no KV yet."""
        return self.request.prompt_len + len(self.output_token_ids)

    def started(self, replica: int, *, stays: bool) -> None:
        """Its prompt is computed there from now on."""
        self.phase, timeline = "prefill", self.client.timeline
        timeline.first_scheduled_ns = timeline.first_scheduled_ns or time.time_ns()
        if stays:
            self.decode_replica = replica
            timeline.prefill_replica, timeline.decode_replica = -1, replica
        else:
            self.prefill_replica = timeline.prefill_replica = replica

    @property
    def is_unseen(self) -> bool:
        """Whether the client has been given no token."""
        return len(self.output_token_ids) == len(self.held)

    def deliver(self) -> None:
        """Gives the client what was held."""
        held, self.held = self.held, []
        for output in held:
            self.client.take(*output)

    @property
    def has_progressed(self) -> bool:
        """Whether this attempt has got on so far that no death before it was this request's doing."""
        return len(self.output_token_ids) - len(self.attempt.resumed_token_ids) >= TOKENS_OF_PROGRESS

    def commit(self, position: int, token_id: int) -> bool:
        """Takes a token of the present attempt at that position of the output. False: it is here already."""
        if position > len(self.output_token_ids):
            raise InternalError(
                f"request {self.request_id}: token {position} came after token {len(self.output_token_ids) - 1}"
            )
        if position < len(self.output_token_ids):
            return False
        self.output_token_ids.append(token_id)
        return True

    def again(self, attempt_id: int) -> None:
        """Begins the next attempt, which has to be prefilled from the prompt and all committed tokens."""
        self.attempt = msgspec.structs.replace(
            self.request, request_id=attempt_id, resumed_token_ids=list(self.output_token_ids)
        )
        self.phase = "queued"
        self.prefill_replica = self.decode_replica = self.handoff = self.moves_to = None


class Lives:
    """The live requests, by their id and by that of their attempt."""

    def __init__(self) -> None:
        self._by_id: dict[int, Life] = {}
        self._by_attempt: dict[int, Life] = {}
        self._deadlines = Deadlines()  # of those that have tokens to come

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_attempts(self) -> int:
        """Of those that have tokens to come: in the queue, or at replicas."""
        return len(self._by_attempt)

    def __iter__(self) -> Iterator[Life]:
        return iter(list(self._by_id.values()))

    def get(self, request_id: int) -> Life | None:
        return self._by_id.get(request_id)

    def of_attempt(self, attempt_id: int) -> Life | None:
        """The live request whose present attempt this is; None for attempts that have ended."""
        return self._by_attempt.get(attempt_id)

    def add(self, life: Life) -> None:
        self._by_id[life.request_id] = life
        self._by_attempt[life.attempt_id] = life
        if life.client.deadline is not None:
            self._deadlines.add(life.request_id, life.client.deadline)

    def begin_again(self, life: Life, attempt_id: int) -> None:
        del self._by_attempt[life.attempt_id]
        life.again(attempt_id)
        self._by_attempt[attempt_id] = life

    def end_attempt(self, life: Life) -> None:
        """All tokens are committed: nothing that a replica says concerns it any more."""
        life.phase = "answering"
        self._by_attempt.pop(life.attempt_id, None)
        self._deadlines.remove(life.request_id)

    def remove(self, life: Life) -> None:
        self._by_id.pop(life.request_id, None)
        self._by_attempt.pop(life.attempt_id, None)
        self._deadlines.remove(life.request_id)

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines.next

    def take_expired(self, now: float) -> list[Life]:
        """Those whose deadline has come, the earliest first; each once."""
        return [self._by_id[request_id] for request_id in self._deadlines.take_expired(now)]
