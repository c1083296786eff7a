"""What an operator's commands about the fleet (fleet_table.py) do."""

import queue
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ensemble.errors import InvalidRequest
from ensemble.router.fleet import Replica
from ensemble.router.router import Router
from ensemble.serving.control import Command, ControlError
from ensemble.serving.fleet_table import (
    AddReplica,
    ChangeRole,
    DrainReplica,
    FleetTable,
    ListFleet,
    RemoveReplica,
    ReplicaRow,
    UndrainReplica,
)
from ensemble.serving.router_thread import RouterThread

ANSWER_WITHIN_S = 5.0


def fleet_handlers(router: RouterThread) -> Mapping[type[Command[Any]], Callable[[Any], msgspec.Struct]]:
    """The commands' handlers, for a ControlServer."""

    def answer(change: Callable[[Router], None]) -> FleetTable:
        def on_its_thread(of: Router) -> FleetTable:
            change(of)
            of.tick(time.monotonic())
            return table(of)

        try:
            return router.ask(on_its_thread, ANSWER_WITHIN_S)
        except queue.Empty:
            raise ControlError(f"the router has not answered within {ANSWER_WITHIN_S:.0f} s") from None

    return {
        ListFleet: lambda command: answer(lambda of: None),
        AddReplica: lambda command: answer(lambda of: add(of, command)),
        DrainReplica: lambda command: answer(lambda of: drain(of, command, is_leaving=False)),
        RemoveReplica: lambda command: answer(lambda of: drain(of, command, is_leaving=True)),
        UndrainReplica: lambda command: answer(lambda of: of.changes.undrain(replica_of(of, command.replica))),
        ChangeRole: lambda command: answer(lambda of: change_role(of, command)),
    }


def table(router: Router) -> FleetTable:
    return FleetTable(
        [
            ReplicaRow(
                each.id,
                each.home,
                each.device,
                each.role,
                each.state,
                each.credits.num_requests if each.is_up else 0,
                each.credits.num_blocks if each.is_up else 0,
                each.num_free_blocks if each.is_up else 0,
                each.node,
            )
            for each in router.fleet
        ]
    )


def add(router: Router, command: AddReplica) -> None:
    router.changes.add("prefill" if command.role == "prefill" else "decode", command.device, command.role)


def drain(router: Router, command: DrainReplica | RemoveReplica, *, is_leaving: bool) -> None:
    replica = replica_of(router, command.replica)
    if not router.changes.serves_without(replica):
        raise InvalidRequest("replica", replica.id, "another replica has to be able to do what it does")
    until = None if command.within_s is None else time.monotonic() + command.within_s
    router.changes.drain(replica, until, is_leaving=is_leaving)


def change_role(router: Router, command: ChangeRole) -> None:
    replica = replica_of(router, command.replica)
    if not router.changes.serves_without(replica, command.role):
        raise InvalidRequest("role", command.role, "some replica has to take prompts, and some to decode")
    router.changes.set_role(replica, command.role)


def replica_of(router: Router, replica_id: int) -> Replica:
    replica = router.fleet.get(replica_id)
    if replica is None:
        known = ", ".join(str(each.id) for each in router.fleet)
        raise InvalidRequest("replica", replica_id, f"one of {known}")
    return replica
