"""The replicas: what they are, whether they serve, what the router has sent them, and who maps whose pool.

loading --ReplicaUp--> up <--> draining --empty, to be removed--> leaving
   ^                    |          |                                 |
   +-----ReplicaDown----+----------+        its next life            +--ReplicaDown--> gone
   |
   +--ReplicaWaits--> pending: its next life waits for room
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ensemble.config import Role, StageName
from ensemble.protocol.router_replica import ReplicaUp
from ensemble.scheduling.credits import Credits
from ensemble.scheduling.estimator import HandoffEstimator, StepEstimator, TimedStep

State = Literal["loading", "pending", "up", "draining", "leaving", "down"]


@dataclass(slots=True, eq=False)
class Replica:
    """One replica, through all its lives."""

    id: int
    home: StageName  # the model whose stub supervises its process
    device: str
    role: Role
    node: str = ""  # of its present life, where there are several machines
    state: State = "loading"
    life: int = -1
    peer_address: str = ""
    credits: Credits = field(default_factory=lambda: Credits(0))  # of its present life
    num_free_blocks: int = 0  # as it said last
    num_swapped_seqs: int = 0  # as it said last
    num_host_blocks: int = 0  # of its present life
    num_free_host_blocks: int = 0  # as it said last
    drain_until: float | None = None  # then what is there goes on elsewhere; by time.monotonic()
    is_leaving: bool = False  # it is removed when it is drained
    down_reason: str = ""
    estimator: StepEstimator = field(default_factory=StepEstimator)  # of all its lives: they have one device
    handoffs: HandoffEstimator = field(default_factory=HandoffEstimator)  # to it
    prefix_pulls: HandoffEstimator = field(default_factory=HandoffEstimator)  # cached prefixes that it fetched
    step_error: float = 0.0  # relative, of predicted step times: the mean of about the last 50
    kv_token_bytes: float = 0.0  # of KV that came to it
    mean_context_len: float = 0.0  # of the sequences of its last step that had any

    def observe(self, step: TimedStep) -> None:
        """It has run."""
        shape = step.shape
        if self.estimator.has_samples:
            error = abs(self.estimator.seconds(shape) - step.seconds) / max(1e-9, step.seconds)
            self.step_error += 0.02 * (min(error, 1.0) - self.step_error)
        self.estimator.observe(shape, step.seconds)
        if shape.num_rows:
            self.mean_context_len = shape.num_row_keys / shape.num_rows

    @property
    def is_up(self) -> bool:
        return self.state in ("up", "draining", "leaving")

    @property
    def takes_prompts(self) -> bool:
        return self.state == "up" and self.role in ("prefill", "mixed")

    @property
    def takes_sequences(self) -> bool:
        return self.state == "up" and self.role in ("decode", "mixed")


class Fleet:
    """Every replica by its id."""

    def __init__(self, replicas: list[tuple[StageName, str, Role]], *, is_auto: bool = False) -> None:
        """`is_auto`: whatever their roles, replicas do what has to be done and no other one can do."""
        self._is_auto = is_auto
        self._replicas = {
            index: Replica(index, home, device, role) for index, (home, device, role) in enumerate(replicas)
        }
        self._num_ids = len(self._replicas)
        # Addresses of dead lives |-> (replica, replicas that have yet to close their mapping of its pool)
        self._detaching: dict[str, tuple[int, set[int]]] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas.values()))

    def get(self, replica_id: int) -> Replica | None:
        return self._replicas.get(replica_id)

    def up_ones(self) -> list[Replica]:
        return [replica for replica in self if replica.is_up]

    @property
    def missing(self) -> StageName | None:
        """What no replica can do at the moment, if anything."""
        if self._is_auto:
            return None if any(replica.state == "up" for replica in self) else "decode"
        if not any(replica.takes_prompts for replica in self):
            return "prefill"
        if not any(replica.takes_sequences for replica in self):
            return "decode"
        return None

    def why_missing(self, stage: StageName) -> str:
        reasons = [replica.down_reason for replica in self if replica.role in (stage, "mixed") and replica.down_reason]
        return reasons[-1] if reasons else "no replica serves"

    def add(self, home: StageName, device: str, role: Role) -> Replica:
        replica = Replica(self._num_ids, home, device, role)
        self._replicas[replica.id] = replica
        self._num_ids += 1
        return replica

    def up(self, event: ReplicaUp) -> Replica | None:
        """Begins a life; None if it has begun already, or nobody knows the replica."""
        replica = self.get(event.replica)
        if replica is None or (replica.is_up and replica.life == event.life):
            return None
        replica.state, replica.life, replica.peer_address = "up", event.life, event.peer_address
        replica.credits, replica.num_free_blocks = Credits(event.num_blocks), event.num_blocks
        replica.num_host_blocks = replica.num_free_host_blocks = event.num_host_blocks
        replica.num_swapped_seqs, replica.down_reason, replica.node = 0, "", event.node
        replica.estimator.learn(event.timed)
        return replica

    def down(self, replica_id: int, life: int, reason: str) -> Replica | None:
        """Ends this life of a replica; None if its end is known already."""
        replica = self.get(replica_id)
        if replica is None or not replica.is_up or replica.life != life:
            return None
        replica.state, replica.down_reason, replica.drain_until, replica.node = "down", reason, None, ""
        return replica

    def waits(self, replica_id: int, waits_for: str) -> None:
        """The next life of a replica does, unless that is known to be over."""
        replica = self.get(replica_id)
        if replica is not None and not replica.is_up:
            replica.state, replica.down_reason = "pending", f"replica {replica_id} waits for {waits_for}"

    def remove(self, replica_id: int) -> None:
        self._replicas.pop(replica_id, None)

    # ---- a dead replica starts again when no other one maps its pool any more: only then its memory is free

    def detach(self, dead: Replica) -> list[Replica]:
        """Begins that. Returns the replicas that have to be told; none: it may start now."""
        readers = [replica for replica in self.up_ones() if replica.id != dead.id]
        if readers:
            self._detaching[dead.peer_address] = (dead.id, {replica.id for replica in readers})
        return readers

    def detached(self, address: str, reader_id: int) -> int | None:
        """A replica maps that pool no more. Returns the replica that may start, after the last one."""
        if address not in self._detaching:
            return None
        replica_id, readers = self._detaching[address]
        readers.discard(reader_id)
        if readers:
            return None
        del self._detaching[address]
        return replica_id

    def reader_down(self, reader_id: int) -> list[int]:
        """A replica is dead, and its mappings with it. Returns the replicas that may start."""
        started = [self.detached(address, reader_id) for address in list(self._detaching)]
        return [replica_id for replica_id in started if replica_id is not None]
