"""Rank processes on the nodes of a Ray cluster: a placement group for each replica, an actor for each rank.

A replica is one bundle, on one node, where a node could hold it; else each place of its pipeline is one.

    placing: the group waits for room --> starting: wardens (warden.py), then ranks --> running: reports --> ended

Each replica is followed by a thread. Commands and events do not pass through Ray: ranks connect to the stage over TCP.
"""

import concurrent.futures
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import ray
import zmq
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ensemble.config import Deployment, StageName
from ensemble.errors import ConfigError
from ensemble.protocol.curve import CurveKey, bind
from ensemble.replicas.launchers.base import ReplicaStart, rank_arguments
from ensemble.replicas.launchers.warden import STAGE_LOST_S, Report, Site, Warden
from ensemble.replicas.progress import Beats
from ensemble.threads import start_vital_thread

ROOM_POLL_S = 0.25
START_S = 120.0  # of an actor, whose node may have to read Python's packages from a disk
KILL_S = 5.0
NODE_LOST_S = STAGE_LOST_S + 5.0  # without a report: by then a warden that lives has ended its rank


class RayLauncher:
    """Of one process. Raises ConfigError without a cluster. program: of a rank; none: ensemble.replicas.worker."""

    def __init__(
        self, deployment: Deployment, home: StageName, key: CurveKey, program: Sequence[str] | None = None
    ) -> None:
        self._deployment = deployment
        self._stage = deployment.stage(home)
        self._key = key
        self._program = program
        self._first_replica = deployment.prefill.num_replicas if home == "decode" else 0
        # Of equal names, as GPUs are shared.
        self._num_sharing = Counter(deployment.prefill.devices + deployment.decode.devices)
        self._started: list[RayRanks] = []
        # In a thread of its own: in the main one Ray would take the process's signals.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(_join_cluster).result()

    def bind(self, socket: "zmq.Socket[bytes]") -> str:
        return bind(socket, f"tcp://{ray.util.get_node_ip_address()}:*", self._key)

    def start(self, start: ReplicaStart) -> "RayRanks":
        shares = [self._share(device) for device in start.devices]
        nodes = [node for node in ray.nodes() if node["Alive"]]
        together = _total(shares)
        num_in_bundle, target = len(shares), self._target(nodes, together, start.replica - self._first_replica)
        if target is None and self._stage.pipeline_parallel_size > 1:
            num_in_bundle = self._stage.tensor_parallel_size
        bundles = [_total(shares[first : first + num_in_bundle]) for first in range(0, len(shares), num_in_bundle)]
        warden = self._deployment.to_yaml(), self._key.secret.decode(), self._program
        self._started = [each for each in self._started if not each.is_collected]
        self._started.append(RayRanks(_Plan(start, bundles, num_in_bundle, shares, target, warden)))
        return self._started[-1]

    def close(self, timeout_s: float) -> None:
        running = [each for each in self._started if not each.is_collected]
        for each in running:
            each.kill()
        deadline = time.monotonic() + timeout_s + KILL_S
        # Where a node does not answer, its warden ends the rank; and Ray ends the wardens of a process that has ended.
        if all(each.has_ended_by(deadline) for each in running):
            ray.shutdown()
        self._started = []

    def _target(self, nodes: list[dict[str, Any]], bundle: dict[str, float], number: int) -> str | None:
        """The node where a replica goes if that has room: of replicas with this number in either stage the same.

        None: no node could ever hold it.
        """
        large = sorted(
            str(node["NodeID"])
            for node in nodes
            if all(node["Resources"].get(kind, 0.0) >= bundle[kind] for kind in bundle)
        )
        return large[number % len(large)] if large else None

    def _share(self, device: str) -> dict[str, float]:
        """What a rank takes of its node."""
        return {"CPU": 1.0} if device == "cpu" else {"CPU": 1.0, "GPU": 1.0 / max(1, self._num_sharing[device])}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a replica is to be."""

    start: ReplicaStart
    bundles: list[dict[str, float]]  # resources of all ranks, by nodes
    num_in_bundle: int  # ranks
    shares: list[dict[str, float]]  # of each rank
    target: str | None  # node where it goes if that has room
    warden: tuple[str, str, Sequence[str] | None]  # its arguments after the host


@dataclass(slots=True)
class _Progress:
    """As reported last."""

    beats: int = 0
    step_s: float = 0.0


class _Ended(Exception):
    """How."""


class RayRanks:
    """The ranks of a replica. What is public is the stage's, the rest its thread's."""

    def __init__(self, plan: _Plan) -> None:
        self.exit_fd = os.eventfd(0)
        self.is_collected = False
        self.waits_for = ""
        self.node = ""
        self._plan = plan
        self._pids: list[int] = []
        self._progress = [_Progress() for _ in plan.shares]
        self._wardens: list[Any] = []  # actor handles
        self._killed = Event()
        self._how = ""
        self._thread = start_vital_thread(self._run, f"replica-{plan.start.name}")

    @property
    def name(self) -> str:
        if not self._pids:
            return f"replica {self._plan.start.replica}, which has no process yet"
        return f"{self._where}: worker process {self._pids[0]}"

    @property
    def progress(self) -> list[Beats]:
        return list(self._progress)

    def kill(self) -> None:
        self._killed.set()
        for warden in list(self._wardens):
            warden.kill.remote()

    def has_ended_by(self, deadline: float) -> bool:
        """Waits for it. deadline: of time.monotonic()."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def collect(self) -> str:
        self._thread.join()
        self.is_collected = True
        os.close(self.exit_fd)
        return self._how

    # ---- the thread

    def _run(self) -> None:
        group: PlacementGroup | None = None
        try:
            if len(self._plan.bundles) == 1:
                group = placement_group(self._plan.bundles, "STRICT_PACK", _soft_target_node_id=self._plan.target)
            else:
                group = placement_group(self._plan.bundles, "PACK")
            self._wait_for_room(group)
            self._start(group)
            self._watch()
        except _Ended as ended:
            self._how = str(ended)
        except RayError as error:
            self._how = f"{self._where} was lost: {_last_line(error)}"
        finally:
            self._end(group)
            os.eventfd_write(self.exit_fd, 1)

    def _wait_for_room(self, group: PlacementGroup) -> None:
        since = time.monotonic()
        while not group.wait(ROOM_POLL_S):
            if self._killed.is_set():
                raise _Ended("it was killed before there was room for it")
            if time.monotonic() > since + 4 * ROOM_POLL_S:
                wanted = [
                    ", ".join(f"{count:g} {kind}" for kind, count in bundle.items()) for bundle in self._plan.bundles
                ]
                self.waits_for = f"{'a node' if len(wanted) == 1 else 'nodes'} with {' and '.join(wanted)} free"
        self.waits_for = ""

    def _start(self, group: PlacementGroup) -> None:
        node_ids = ray.util.placement_group_table(group)["bundles_to_node_id"]
        alive = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
        nodes = [alive.get(node_ids[index]) for index in range(len(self._plan.bundles))]
        if None in nodes:
            raise _Ended("a node where it was to start was lost")
        places = [node for node in nodes if node is not None]
        self.node = ", ".join(dict.fromkeys(str(node["NodeName"]) for node in places))
        actor = ray.remote(Warden)
        for rank, share in enumerate(self._plan.shares):
            bundle = rank // self._plan.num_in_bundle
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            options = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0)}
            warden = actor.options(scheduling_strategy=strategy, max_concurrency=4, **options)
            self._wardens.append(warden.remote(places[bundle]["NodeManagerAddress"], *self._plan.warden))
        start = self._plan.start
        sites: list[Site] = self._all(
            [
                warden.prepare.remote(start.stage_address, device, len(start.devices), len(set(node_ids.values())) > 1)
                for warden, device in zip(self._wardens, start.devices, strict=True)
            ]
        )
        start = replace(start, devices=tuple(site.device for site in sites))
        group_address = sites[0].group_address
        self._pids = self._all(
            [
                warden.start.remote(rank_arguments(start, rank, site.peer_address, group_address))
                for rank, (warden, site) in enumerate(zip(self._wardens, sites, strict=True))
            ]
        )

    def _all(self, answers: list[Any]) -> list[Any]:
        """Of the wardens, while they start."""
        deadline = time.monotonic() + START_S
        waiting = answers
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=ROOM_POLL_S)
            try:
                ray.get(ready)
            except RayTaskError as error:
                reason = error.cause if isinstance(error.cause, ConfigError) else _last_line(error)
                raise _Ended(f"{self._where}: {reason}") from None
            if self._killed.is_set():
                raise _Ended("it was killed before it had started")
            if time.monotonic() > deadline:
                raise _Ended(f"{self._where}: no process had started after {START_S:.0f} s")
        return list(ray.get(answers))

    def _watch(self) -> None:
        asked = {warden.report.remote(): (rank, time.monotonic()) for rank, warden in enumerate(self._wardens)}
        while True:
            done, _ = ray.wait(list(asked), timeout=ROOM_POLL_S)
            now = time.monotonic()
            for each in done:
                rank, _ = asked.pop(each)
                report: Report = ray.get(each)
                self._progress[rank].beats, self._progress[rank].step_s = report.beats, report.step_s
                if report.end is not None:
                    raise _Ended(f"{self._where}: {report.end}")
                asked[self._wardens[rank].report.remote()] = rank, now
            if any(now > asked_at + NODE_LOST_S for _, asked_at in asked.values()):
                raise _Ended(f"{self._where} has said nothing for {NODE_LOST_S:.0f} s")

    def _end(self, group: PlacementGroup | None) -> None:
        """Nothing of the replica is left where its nodes can be reached."""
        with contextlib.suppress(RayError):
            ends = [warden.kill.remote() for warden in self._wardens]
            ray.wait(ends, num_returns=len(ends), timeout=KILL_S) if ends else None
        for warden in self._wardens:
            with contextlib.suppress(RayError):
                ray.kill(warden)
        if group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(group)

    @property
    def _where(self) -> str:
        return f"node {self.node}" if self.node else "the Ray cluster"


def _total(shares: list[dict[str, float]]) -> dict[str, float]:
    kinds = sorted({kind for share in shares for kind in share})
    return {kind: sum(share.get(kind, 0.0) for share in shares) for kind in kinds}


def _join_cluster() -> None:
    """Raises ConfigError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ConfigError("RAY_ADDRESS is not set: launcher = ray needs a cluster")
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # of what a replica that has ended was still asked
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a call after the end would start a cluster
    try:
        ray.init(address, log_to_driver=True, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"RAY_ADDRESS = {address}: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
