"""The scheduler's brain: what comes from clients, and what time brings. No threads, no I/O.

lives     one record for each live request
fleet     the replicas
dispatch  the schedulers, and the commands
attempts  what is lost is computed again, what cannot go on is failed
events    what replicas tell, and what follows from it
changes   lives, roles and numbers of the replicas
balance   running sequences from busy replicas to others
"""

from collections import Counter
from collections.abc import Callable

from ensemble.config import Deployment
from ensemble.errors import (
    Cancelled,
    DeadlineExceeded,
    DistServeError,
    StageUnavailable,
)
from ensemble.protocol.router_replica import (
    FromReplica,
    FromStage,
    ReplicaDown,
    ReplicaUp,
    ReplicaWaits,
    decode_event,
)
from ensemble.request import Request
from ensemble.router.attempts import Attempts
from ensemble.router.balance import Balance
from ensemble.router.dispatch import Dispatch, Send
from ensemble.router.events import Events, Observe
from ensemble.router.fleet import Fleet
from ensemble.router.fleet_changes import FleetChanges
from ensemble.router.gauges import Gauges, Totals, gauges
from ensemble.router.lives import Client, Life, Lives

MAX_MISSING_S = 30.0  # requests wait so long for a fleet that cannot serve them
BY_CLIENT = "the client cancelled the request"


class Router:
    """`now` is time.monotonic() of what is told."""

    def __init__(
        self,
        deployment: Deployment,
        send: Send,
        new_id: Callable[[], int],
        now: float,
        observe: Observe = lambda name, values, labels: None,
    ) -> None:
        self._totals: Totals = Counter()
        self.lives = Lives()
        self.fleet = Fleet(deployment.replicas(), is_auto=deployment.scheduler.roles == "auto")
        common = deployment, self.lives, self.fleet
        self.dispatch = Dispatch(*common, send, lambda life, error: self.attempts.fail(life, error), new_id)
        self.attempts = Attempts(*common, self.dispatch, self._totals, new_id)
        self.changes = FleetChanges(*common, self.dispatch, self.attempts, send, self._totals, now)
        self._events = Events(*common, self.dispatch, self.attempts, self.changes, self._totals, observe)
        self.balance = Balance(*common, self.dispatch)
        self._missing_since: float | None = now  # since when nobody could be served; None: somebody can
        self._gave_up = False  # waiting for that to end
        self._is_closed = False

    # ---- clients

    def arrive(self, request: Request, client: Client, now: float, same_prompt: int | None = None) -> None:
        """Queues a request, or fails it at once. `same_prompt`: an earlier request, with the same prompt."""
        life = Life(request, client, request, now)
        first = None if same_prompt is None else self.lives.get(same_prompt)
        try:
            if self._is_closed:
                raise StageUnavailable("scheduler", "the server is stopping")
            missing = self.fleet.missing
            if missing is not None and self._gave_up:
                raise StageUnavailable(missing, self.fleet.why_missing(missing))
            self.dispatch.enqueue(life, now, first=first)
        except DistServeError as error:
            client.fail(error)
            return
        self.lives.add(life)

    def cancel(self, request_id: int) -> None:
        """Ends a request wherever it is; its client gets CANCELLED."""
        life = self.lives.get(request_id)
        if life is not None and not life.client.is_answered:  # else it has what it wanted, and closed before we knew
            self.attempts.fail(life, Cancelled(BY_CLIENT))

    def answered(self, request_id: int) -> None:
        """Its last response was sent, after its last token or a stop string."""
        life = self.lives.get(request_id)
        if life is not None:
            self.attempts.give_up(life)
            self.attempts.remove(life)
            self.dispatch.output_estimate.observe(life.request, len(life.output_token_ids))
            life.client.ended()

    def close(self) -> None:
        """Ends every request with an error, and takes no more."""
        self._is_closed = True
        self.fail_all(StageUnavailable("scheduler", "the server is stopping"))

    def fail_all(self, error: DistServeError) -> None:
        for life in self.lives:
            self.attempts.fail(life, error)

    # ---- time

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest, though nothing comes."""
        times = [each for each in (self.lives.next_deadline, self.changes.next_deadline) if each is not None]
        times += [] if self._missing_since is None or self._gave_up else [self._missing_since + MAX_MISSING_S]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """What is due: deadlines, drains, and everything that can start."""
        for life in self.lives.take_expired(now):
            if not life.client.is_answered:
                self._totals["distserve:deadline_exceeded_total", ()] += 1
                self.attempts.fail(life, DeadlineExceeded("deadline exceeded: the request's timeout_ms has passed"))
        self._watch_missing(now)
        self.changes.tick(now)
        self.dispatch.dispatch(now)
        self.balance.tick(now)

    @property
    def is_serving(self) -> bool:
        """Whether a request that came now could be served."""
        return self.fleet.missing is None and not self._is_closed

    def _watch_missing(self, now: float) -> None:
        """A fleet that cannot serve has some time to come back; then what waits for it ends."""
        missing = self.fleet.missing
        if missing is None:
            self._missing_since, self._gave_up = None, False
            return
        self._missing_since = now if self._missing_since is None else self._missing_since
        if self._gave_up or now < self._missing_since + MAX_MISSING_S:
            return
        self._gave_up = True
        error = StageUnavailable(missing, self.fleet.why_missing(missing))
        for life in self.lives:
            if life.phase == "queued" or (life.phase == "bridge" and missing == "decode"):
                self.attempts.fail(life, error)

    # ---- replicas

    def receive(self, item: FromStage, now: float) -> None:
        """What a stage tells."""
        match item:
            case ReplicaWaits(replica=replica_id, waits_for=waits_for):
                self.fleet.waits(replica_id, waits_for)
            case ReplicaUp():
                self.changes.replica_up(item, now)
            case ReplicaDown():
                self.changes.replica_down(item, now)
            case FromReplica():
                replica = self.fleet.get(item.replica)
                if replica is not None and replica.is_up and replica.life == item.life:
                    self._events.receive(replica, decode_event(item.event), now)

    def gauges(self) -> Gauges:
        return gauges(self.lives, self.fleet, self.dispatch, self._totals)
