"""Faults of a served model's replicas, and what clients may notice of them: silence, for some seconds."""

import os
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from ensemble.config import Role
from ensemble.serving.control import call
from ensemble.serving.fleet_table import ChangeRole, FleetTable, ListFleet, ReplicaRow
from tools.benchmarks.results import at_most, exactly
from tools.proofs.known_requests import COMPLETE, FAILED, HUNG, REFUSED, TAKEN, WENT_AWAY, WRONG, Outcome
from tools.server.server_state import workers
from tools.server.triton_server import TritonServer

SILENCE_GOAL_S = 5.0  # of a stream, while other replicas can take over
UNDISTURBED = ("without a fault", SILENCE_GOAL_S)
END_TIMEOUT_S = 60.0  # of a process that was killed, or stands still


@dataclass(frozen=True, slots=True)
class Shape:
    """Which replicas a fleet has, as in 2P1D1M: two of role prefill, one decode, one mixed."""

    num_prefill: int
    num_decode: int
    num_mixed: int

    @classmethod
    def parse(cls, name: str) -> "Shape":
        """Raises ValueError."""
        found = re.fullmatch(r"(?:(\d+)P)?(?:(\d+)D)?(?:(\d+)M)?", name)
        if not name or found is None:
            raise ValueError(f"fleet = {name!r}: such as 1P1D, 2P1D1M or 2M")
        shape = cls(*(int(count or 0) for count in found.groups()))
        if not (shape.num_prefill or shape.num_mixed) or not (shape.num_decode or shape.num_mixed):
            raise ValueError(f"fleet = {name!r}: some replica has to take prompts, and some to decode")
        return shape

    def __str__(self) -> str:
        counts = ((self.num_prefill, "P"), (self.num_decode, "D"), (self.num_mixed, "M"))
        return "".join(f"{count}{letter}" for count, letter in counts if count)

    def fields(self, devices: Sequence[str]) -> dict[str, Any]:
        """Of a deployment: its mode, and the devices by turns. `assign_roles` does the rest."""
        num_at_home = self.num_decode + self.num_mixed
        names = [devices[index % len(devices)] for index in range(self.num_prefill + num_at_home)]
        return {
            "mode": "disaggregated" if self.num_prefill else "colocated",
            "prefill": {"devices": names[: self.num_prefill]},
            "decode": {"devices": names[self.num_prefill :]},
        }

    def assign_roles(self, server: TritonServer) -> None:
        """Decode's replicas are the first ones of their home, mixed ones the others."""
        counts: dict[Role, int] = {"prefill": self.num_prefill, "decode": self.num_decode, "mixed": self.num_mixed}
        roles: list[Role] = [role for role, count in counts.items() for _ in range(count)]
        present = list_fleet(server)
        in_order: tuple[Role, ...] = ("mixed", "decode")  # so that at every moment somebody takes prompts
        for role in in_order:
            for row in present:
                if roles[row.replica] == role != row.role:
                    call(server.run_dir, ChangeRole(row.replica, role), FleetTable, timeout_s=10.0)


@dataclass(slots=True)
class Fault:
    """Replicas were killed, or stopped and then killed by their stage."""

    roles: list[Role]  # of those that were struck
    ranks: list[int]  # which one of each
    is_stop: bool  # by SIGSTOP
    struck_at: float  # time.monotonic(), as all times here
    struck_at_ns: int  # time.time_ns()
    max_silence_s: float  # of a stream, from then on
    takes_service: bool  # nobody was left who does what they did
    gone_s: float = 0.0  # until the last process had ended
    served_at: float | None = None  # end of the first request that was sent after it and served

    @property
    def name(self) -> str:
        what = "after a SIGSTOP" if self.is_stop else "after a kill"
        return what + (" of all that do the same" if self.takes_service else "")


def list_fleet(server: TritonServer) -> list[ReplicaRow]:
    return call(server.run_dir, ListFleet(), FleetTable, timeout_s=10.0).replicas


def process_of(server: TritonServer, replica: int, rank: int = 0) -> psutil.Process | None:
    for process in workers(server):
        arguments = process.cmdline()
        _, its_replica, _, its_rank = arguments[arguments.index("ensemble.replicas.worker") + 1 :][:4]
        if (its_replica, its_rank) == (str(replica), str(rank)):
            return process
    return None


def strike(server: TritonServer, struck: list[ReplicaRow], *, is_stop: bool, load_s: float, turn: int = 0) -> Fault:
    """Sends SIGKILL or SIGSTOP to a rank of replicas that are up, and waits until those processes have ended.

    `turn`: whose, of the ranks of a replica, which take turns.
    Where nobody is left who does what they did, streams may be silent while they start again: for `load_s` more.
    """
    left = [row for row in list_fleet(server) if row.state == "up" and row.replica not in {r.replica for r in struck}]
    serves = any(row.role != "decode" for row in left) and any(row.role != "prefill" for row in left)
    hang_s = server.deployment.hang_timeout_s if is_stop else 0.0
    max_silence_s = round(SILENCE_GOAL_S + hang_s + (0.0 if serves else load_s), 1)
    ranks = [turn % server.deployment.stage(row.home).num_ranks for row in struck]
    found = [process_of(server, row.replica, rank) for row, rank in zip(struck, ranks, strict=True)]
    pids = [process.pid for process in found if process is not None]
    ends = [os.pidfd_open(pid) for pid in pids]
    roles: list[Role] = [row.role for row in struck]
    fault = Fault(roles, ranks, is_stop, time.monotonic(), time.time_ns(), max_silence_s, not serves)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP if is_stop else signal.SIGKILL)
    for end in ends:
        poller = select.poll()  # of descriptors of any number, as select is not
        poller.register(end, select.POLLIN)
        poller.poll(END_TIMEOUT_S * 1e3)
        os.close(end)
    fault.gone_s = time.monotonic() - fault.struck_at
    return fault


def silence_rows(faults: list[Fault], outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """The longest silence of a stream after each kind of fault, and apart from all; those that are too long fail.

    A silence is by the faults that struck in it, else by the last one before it, which was over before another struck.
    """
    longest = {(fault.name, fault.max_silence_s): 0.0 for fault in faults} | {UNDISTURBED: 0.0}
    for begin, end in (silence for outcome in outcomes for silence in outcome.silences):
        causes = [fault for fault in faults if begin <= fault.struck_at < end]
        before = [fault for fault in faults if fault.struck_at < begin < fault.struck_at + fault.max_silence_s]
        kinds = [(fault.name, fault.max_silence_s) for fault in causes or before[-1:]]
        kind = max(kinds, key=lambda kind: kind[1], default=UNDISTURBED)
        longest[kind] = max(longest[kind], end - begin)
    return [
        at_most(f"longest silence of a stream {name}", round(seconds, 2), "s", goal_s)
        for (name, goal_s), seconds in sorted(longest.items())
    ]


def verdict_rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """How many requests ended how; no fault is allowed."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    expected = [verdict for verdict in (COMPLETE, WENT_AWAY, REFUSED) if counts[verdict]]
    return [
        *({"name": f"requests: {verdict}", "value": counts[verdict], "unit": "requests"} for verdict in expected),
        *(
            exactly(f"requests: {verdict}", counts[verdict], "requests", 0)
            | {"seen": [each.reason for each in outcomes if each.verdict == verdict][:5]}
            for verdict in (FAILED, WRONG, HUNG, TAKEN)
        ),
    ]
