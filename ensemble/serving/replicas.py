"""The scheduler's end of the channels to the workers: which replicas are up, their numbered commands, and whose pool
is still mapped by whom.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from ensemble.serving.metrics import Labels
from ensemble.serving.stage_calls import StageName
from ensemble.workers.messages import Command, ReplicaUp


@dataclass(slots=True, eq=False)
class Replica:
    """One life of a worker."""

    epoch: int
    peer_address: str
    num_blocks: int
    num_free_blocks: int  # as the worker said last
    num_swapped_seqs: int = 0  # as the worker said last
    next_number: int = 0


class Replicas:
    """Every replica of both stages, up or not, by stage and index."""

    def __init__(self, num_replicas: Mapping[StageName, int]) -> None:
        self._num_replicas = num_replicas
        self._up: dict[tuple[StageName, int], Replica] = {}
        self._down_reasons: dict[StageName, str] = {}  # of stages without a live replica
        # Dead prefill workers' addresses |-> (replica, decode replicas that have yet to close their mapping)
        self._detaching: dict[str, tuple[int, set[int]]] = {}

    def get(self, stage: StageName, index: int) -> Replica | None:
        """The replica if it is up."""
        return self._up.get((stage, index))

    def of_stage(self, stage: StageName) -> dict[int, Replica]:
        """Those that are up."""
        return {index: replica for (each, index), replica in self._up.items() if each == stage}

    def missing_stage(self) -> tuple[StageName, str | None] | None:
        """A stage that has replicas and none of them up, and why; the reason is None if none was ever up."""
        for stage, num_replicas in self._num_replicas.items():
            if num_replicas and not self.of_stage(stage):
                return stage, self._down_reasons.get(stage)
        return None

    def up(self, stage: StageName, up: ReplicaUp) -> None:
        self._up[stage, up.replica] = Replica(up.epoch, up.peer_address, up.num_blocks, up.num_blocks)
        self._down_reasons.pop(stage, None)

    def down(self, stage: StageName, index: int, epoch: int, reason: str) -> Replica | None:
        """Ends this life of a worker; None if its end is known already."""
        replica = self.get(stage, index)
        if replica is None or replica.epoch != epoch:
            return None
        del self._up[stage, index]
        if not self.of_stage(stage):
            self._down_reasons[stage] = reason
        return replica

    def numbered(self, stage: StageName, command: Command) -> Command | None:
        """The command with its place in the replica's order; None if the replica is not up."""
        replica = self.get(stage, command.replica)
        if replica is None:
            return None
        command = msgspec.structs.replace(command, epoch=replica.epoch, number=replica.next_number)
        replica.next_number += 1
        return command

    # ---- a dead prefill worker starts again when no decode worker maps its pool any more

    def detach(self, address: str, prefill_replica: int) -> list[int]:
        """Begins that. Returns the decode replicas that have to be told; none: the worker may start now."""
        readers = set(self.of_stage("decode"))
        if readers:
            self._detaching[address] = (prefill_replica, readers)
        return sorted(readers)

    def detached(self, address: str, decode_replica: int) -> int | None:
        """A decode replica maps that pool no more. Returns the prefill replica that may start, after the last one."""
        if address not in self._detaching:
            return None
        prefill_replica, readers = self._detaching[address]
        readers.discard(decode_replica)
        if readers:
            return None
        del self._detaching[address]
        return prefill_replica

    def reader_down(self, decode_replica: int) -> list[int]:
        """A decode worker is dead, and its mappings with it. Returns the prefill replicas that may start."""
        started = [self.detached(address, decode_replica) for address in list(self._detaching)]
        return [replica for replica in started if replica is not None]

    def gauges(self) -> Iterator[tuple[tuple[str, Labels], float]]:
        """What is the case now, for the metrics."""
        yield ("vllm:num_requests_swapped", ()), sum(each.num_swapped_seqs for each in self._up.values())
        for stage, num_replicas in self._num_replicas.items():
            for index in range(num_replicas):
                labels = (("stage", stage), ("replica", str(index)))
                replica = self.get(stage, index)
                yield ("distserve:replica_up", labels), int(replica is not None)
                yield ("distserve:kv_blocks", labels), replica.num_blocks if replica else 0
                yield ("distserve:kv_blocks_free", labels), replica.num_free_blocks if replica else 0
