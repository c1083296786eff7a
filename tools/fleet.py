"""The replicas of a running server: what they do, and changes while it serves.

    python -m tools.fleet list
    python -m tools.fleet add --device cuda:2 --role decode
    python -m tools.fleet drain 3 --within 60       no more requests; what is left after 60 s goes on elsewhere
    python -m tools.fleet undrain 3
    python -m tools.fleet remove 3 --within 60      drains it, then ends it
    python -m tools.fleet role 1 mixed              prefill, decode or mixed; within a second, without a reload

Of several servers on this machine, --http-port says which.
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ensemble.config import Role
from ensemble.serving.control import Command, ControlError, call
from ensemble.serving.fleet_table import (
    AddReplica,
    ChangeRole,
    DrainReplica,
    FleetTable,
    ListFleet,
    RemoveReplica,
    UndrainReplica,
)
from tools.command_line import run
from tools.server.run_dir import running_servers

POLL_S = 0.2
MAX_WIDTH = 250  # of a table
app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
Replica = Annotated[int, typer.Argument(help="its number in the list", min=0)]
Port = Annotated[int | None, typer.Option("--http-port", envvar="HTTP_PORT", help="of the server")]
Within = Annotated[float | None, typer.Option(min=0, help="seconds; then what is left goes on elsewhere")]
Wait = Annotated[bool, typer.Option(help="return when it is done")]


@app.command("list")
def list_fleet(http_port: Port = None) -> None:
    """Shows the replicas."""
    show(ask(http_port, ListFleet()))


@app.command()
def add(
    device: Annotated[str, typer.Option(help="such as cuda:2 or cpu")],
    role: Annotated[str, typer.Option(help="prefill, decode or mixed")] = "mixed",
    http_port: Port = None,
) -> None:
    """Starts one more replica."""
    show(ask(http_port, AddReplica(device, to_role(role))))


@app.command()
def drain(replica: Replica, within: Within = None, wait: Wait = True, http_port: Port = None) -> None:
    """Gives a replica no more requests."""
    answer = ask(http_port, DrainReplica(replica, within))
    while wait and any(each.num_requests for each in answer.replicas if each.replica == replica):
        time.sleep(POLL_S)
        answer = ask(http_port, ListFleet())
    show(answer)


@app.command()
def undrain(replica: Replica, http_port: Port = None) -> None:
    """Gives it requests again."""
    show(ask(http_port, UndrainReplica(replica)))


@app.command()
def remove(replica: Replica, within: Within = None, wait: Wait = True, http_port: Port = None) -> None:
    """Drains a replica, then ends it."""
    answer = ask(http_port, RemoveReplica(replica, within))
    while wait and any(each.replica == replica for each in answer.replicas):
        time.sleep(POLL_S)
        answer = ask(http_port, ListFleet())
    show(answer)


@app.command()
def role(
    replica: Replica,
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed")],
    http_port: Port = None,
) -> None:
    """Changes what a replica is given."""
    show(ask(http_port, ChangeRole(replica, to_role(role))))


def to_role(name: str) -> Role:
    if name not in ("prefill", "decode", "mixed"):
        raise ControlError(f"role = {name!r}: one of prefill, decode, mixed")
    return name  # type: ignore[return-value]  # it is one of them


def ask(http_port: int | None, command: Command[FleetTable]) -> FleetTable:
    return call(the_server(http_port), command, FleetTable, timeout_s=10.0)


def the_server(http_port: int | None) -> Path:
    """The run directory of the server that is meant. Raises ControlError."""
    servers = running_servers()
    found = [path for path, port in servers.items() if http_port in (None, port)]
    if len(found) == 1:
        return found[0]
    ports = ", ".join(str(port) for port in sorted(servers.values()))
    if not servers:
        raise ControlError("no server of this user runs here: start one with `make serve`")
    raise ControlError(f"--http-port = {http_port}: servers of this user run on the ports {ports}")


def show(fleet: FleetTable) -> None:
    has_nodes = any(each.node for each in fleet.replicas)
    columns = ["replica", "role", "state", "device", "home", "requests", "KV blocks free"]
    table = Table(*columns, *(["node"] if has_nodes else []), box=None, padding=(0, 2, 0, 0))
    for each in fleet.replicas:
        node = [each.node] if has_nodes else []
        free = f"{each.num_free_blocks} of {each.num_blocks}"
        row = [str(each.replica), each.role, each.state, each.device, each.home, str(each.num_requests), free]
        table.add_row(*row, *node)
    Console(width=MAX_WIDTH).print(table)  # no wider than it has to be; cut nowhere


if __name__ == "__main__":
    run(app)
