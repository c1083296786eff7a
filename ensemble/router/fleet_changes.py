"""What becomes of the replicas: their lives, their roles, who is added, drained and removed."""

from dataclasses import dataclass

from ensemble.config import Deployment, Role, StageName
from ensemble.errors import InvalidRequest
from ensemble.protocol.router_replica import (
    AddReplica,
    Detached,
    DetachPeer,
    RemoveReplica,
    ReplicaDown,
    ReplicaUp,
    StartReplica,
)
from ensemble.router.attempts import Attempts
from ensemble.router.dispatch import Dispatch, Send
from ensemble.router.fleet import Fleet, Replica
from ensemble.router.gauges import Totals
from ensemble.router.lives import Lives
from ensemble.scheduling.roles import RolePolicy

ROLES_INTERVAL_S = 0.5  # between two looks at what each side bears


@dataclass(eq=False)
class FleetChanges:
    _deployment: Deployment
    _lives: Lives
    _fleet: Fleet
    _dispatch: Dispatch
    _attempts: Attempts
    _send: Send
    _totals: Totals
    _roles_due: float

    def __post_init__(self) -> None:
        scheduler = self._deployment.scheduler
        self._is_auto = scheduler.roles == "auto"
        self._roles = RolePolicy(scheduler.min_prefill_replicas, scheduler.max_prefill_replicas)

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest, though nothing comes."""
        times = [replica.drain_until for replica in self._fleet if replica.drain_until is not None]
        return min(times + ([self._roles_due] if self._shifts_roles else []), default=None)

    def tick(self, now: float) -> None:
        self._drain(now)
        self._shift_roles(now)

    # ---- lives

    def replica_up(self, up: ReplicaUp, now: float) -> None:
        known = self._fleet.get(up.replica)
        if known is not None and known.is_up and known.life != up.life:  # its stage has no more to say of the old life
            self.replica_down(ReplicaDown(replica=up.replica, life=known.life, reason="another life began"), now)
        replica = self._fleet.up(up)
        if replica is not None:
            self._pools_changed(self._dispatch.replica_up(replica, up))

    def replica_down(self, down: ReplicaDown, now: float) -> None:
        replica = self._fleet.down(down.replica, down.life, down.reason)
        if replica is not None:
            held = replica.credits.request_ids
            for reader in self._fleet.detach(replica):
                self._dispatch.command(reader, DetachPeer(address=replica.peer_address))
            if not any(reader.id != replica.id for reader in self._fleet.up_ones()):
                self._start(replica.id)
            for replica_id in self._fleet.reader_down(replica.id):
                self._start(replica_id)
            self._dispatch.replica_down(replica)
            for attempt_id in held:
                self._attempts.lost(attempt_id, replica, down.reason, now)
            for source in self._fleet.up_ones():
                self._attempts.fail_unreachable(source)
        if down.is_final:
            self._removed(down.replica)

    def detached(self, event: Detached, reader: Replica) -> None:
        self._start(self._fleet.detached(event.address, reader.id))

    def _start(self, replica_id: int | None) -> None:
        """The next life of a dead replica may begin: nobody maps its pool any more."""
        replica = self._fleet.get(replica_id) if replica_id is not None else None
        if replica is not None:
            self._send(replica.home, StartReplica(replica=replica.id))

    # ---- roles and numbers

    def set_role(self, replica: Replica, role: Role) -> None:
        """What it is given from now on; what it has goes on there."""
        replica.role = role
        if replica.is_up:
            self._pools_changed(self._dispatch.role_changed(replica))

    @property
    def _shifts_roles(self) -> bool:
        return self._is_auto and sum(replica.role != "mixed" for replica in self._fleet) > 2

    def _shift_roles(self, now: float) -> None:
        """Looks now and then whether the load wants a replica on the other side; the dead ones will be back."""
        if not self._shifts_roles or now < self._roles_due:
            return
        self._roles_due = now + ROLES_INTERVAL_S
        roles = [replica.role for replica in self._fleet]
        side = self._roles.decide(now, self._dispatch.pressure(), roles.count("prefill"), roles.count("decode"))
        replica = None if side is None else self._dispatch.to_change(side)
        if side is not None and replica is not None and self.serves_without(replica, side):
            self._totals["distserve:role_changes_total", (("to", side),)] += 1
            self.set_role(replica, side)

    def drain(self, replica: Replica, until: float | None, *, is_leaving: bool = False) -> None:
        """It gets no more requests. Those it has end there or, at `until`, go on elsewhere."""
        replica.drain_until, replica.is_leaving = until, replica.is_leaving or is_leaving
        if replica.state == "up":
            replica.state = "draining"
            self._pools_changed(self._dispatch.role_changed(replica))
        elif is_leaving and not replica.is_up:
            self._send(replica.home, RemoveReplica(replica=replica.id))

    def undrain(self, replica: Replica) -> None:
        if replica.state == "draining" and not replica.is_leaving:
            replica.state, replica.drain_until = "up", None
            self._pools_changed(self._dispatch.role_changed(replica))

    def add(self, home: StageName, device: str, role: Role) -> Replica:
        replica = self._fleet.add(home, device, role)
        self._send(home, AddReplica(replica=replica.id, device=device))
        return replica

    def serves_without(self, replica: Replica, role: Role | None = None) -> bool:
        """Whether the others, and it in another role if that is given, can do all there is to do."""
        roles = [each.role for each in self._fleet if each.state == "up" and each.id != replica.id]
        roles += [] if role is None else [role]
        return any(each != "decode" for each in roles) and any(each != "prefill" for each in roles)

    def _drain(self, now: float) -> None:
        for replica in self._fleet:
            if replica.state != "draining":
                continue
            if replica.drain_until is not None and now >= replica.drain_until:
                replica.drain_until = None
                self._attempts.move(replica, now)
            if replica.is_leaving and not replica.credits.num_requests:
                replica.state = "leaving"
                self._send(replica.home, RemoveReplica(replica=replica.id))

    def _removed(self, replica_id: int) -> None:
        replica = self._fleet.get(replica_id)
        if replica is not None:
            self._dispatch.replica_removed(replica)
            self._fleet.remove(replica_id)

    def _pools_changed(self, refused: list[int]) -> None:
        """What no known pool could ever hold ends: attempts that have left the queue so, and what has gone further."""
        limit = self._dispatch.prefill.max_prompt_len
        for attempt_id in refused:
            life = self._lives.of_attempt(attempt_id)
            if life is not None:
                field, allowed = "length of input_ids or text_input", f"the prefill pool holds {limit} tokens"
                self._attempts.fail(life, InvalidRequest(field, life.attempt.prefill_len, allowed))
        for life in self._lives:
            if life.phase in ("queued", "prefill", "bridge"):
                try:
                    self._dispatch.admission.check(life.attempt)
                except InvalidRequest as error:
                    self._attempts.fail(life, error)
        for source in self._fleet.up_ones():
            self._attempts.fail_unreachable(source)
