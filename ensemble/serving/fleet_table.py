"""An operator's commands about the fleet, and their answer, as they go over the control socket (control.py).

Apart from what carries them out, which takes seconds to import.
"""

import msgspec

from ensemble.config import Role, StageName
from ensemble.serving.control import Command


class ReplicaRow(msgspec.Struct, frozen=True):
    """One replica, as the router sees it."""

    replica: int
    home: StageName
    device: str
    role: Role
    state: str
    num_requests: int
    num_blocks: int
    num_free_blocks: int
    node: str = ""  # where it runs, if there are several machines


class FleetTable(msgspec.Struct, frozen=True):
    replicas: list[ReplicaRow]


class ListFleet(Command[FleetTable], frozen=True, tag=True):
    """Changes nothing."""


class AddReplica(Command[FleetTable], frozen=True, tag=True):
    """Starts one more replica; it serves as soon as it has loaded."""

    device: str
    role: Role


class DrainReplica(Command[FleetTable], frozen=True, tag=True):
    """It gets no more requests. Those that it has end there, or after `within_s` elsewhere."""

    replica: int
    within_s: float | None = None


class UndrainReplica(Command[FleetTable], frozen=True, tag=True):
    """It gets requests again."""

    replica: int


class RemoveReplica(Command[FleetTable], frozen=True, tag=True):
    """Drains it, then ends it."""

    replica: int
    within_s: float | None = None


class ChangeRole(Command[FleetTable], frozen=True, tag=True):
    """What it gets from now on is another part of the work; what it has goes on there."""

    replica: int
    role: Role
