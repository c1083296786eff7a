"""Replicas of several ranks in one process."""

from pathlib import Path

from ensemble.config import Deployment, StageName
from tests.replicas.pair import Pair, Replica
from tools.proofs.rank_threads import RankThreads


class GroupReplica(Replica):
    """The leader's loop, and its sockets to peers."""

    def __init__(self, deployment: Deployment, home: StageName, address: str) -> None:
        self.ranks = RankThreads(deployment, home, address)
        self.address, self.context = address, self.ranks.context
        self.engine, self.loop = self.ranks.engine, self.ranks.loop
        self.server, self.peers = self.ranks.server, self.ranks.peers

    def close(self) -> None:
        self.ranks.close()


class GroupPair(Pair):
    """One replica for prompts and one for sequences."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        self.prefill = GroupReplica(deployment, "prefill", f"ipc://{run_dir}/prefill")
        self.decode = GroupReplica(deployment, "decode", f"ipc://{run_dir}/decode")
