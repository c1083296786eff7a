"""A replica of several ranks in one process: its leader is run by the test, each follower by a thread of its own."""

import threading
from pathlib import Path

import torch
import zmq
from torch.distributed import HashStore

from ensemble.config import Deployment, StageName
from ensemble.engine.engine import Engine, load_engine
from ensemble.models.fingerprint import fingerprint
from ensemble.parallel.group import Group, join
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.follower import Follower, connect_to_leader
from ensemble.replicas.followers import Followers, GroupPeers
from ensemble.replicas.loop import EngineLoop, loop_settings
from ensemble.replicas.peers import Peers, PeerServer, pool_layout, rank_address
from ensemble.replicas.progress import Progress
from tests.replicas.pair import Pair, Replica

CPU = torch.device("cpu")
TIMEOUT_S = 30.0


class GroupReplica(Replica):
    """The leader's loop, and its sockets to peers and followers."""

    def __init__(self, deployment: Deployment, home: StageName, address: str) -> None:
        self.address = address
        self.context = zmq.Context()
        self._deployment, self._home = deployment, home
        self._group_address = f"file://{address.removeprefix('ipc://')}.group"
        self._store = HashStore()
        self._ends = threading.Event()
        size = deployment.stage(home).num_ranks
        self.follower_errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._follow, args=(rank,), daemon=True) for rank in range(1, size)]
        for thread in self._threads:
            thread.start()
        self.followers = Followers(self.context, self._group_address, size - 1)
        group = self._join(0)
        self.engine = self._load(group)
        self.server, layout = self._serve(self.context, self.engine)
        self.peers = GroupPeers(self.context, CPU, layout, self.followers)
        settings = loop_settings(deployment, home)
        self.loop = EngineLoop(self.engine, self.peers, settings, address, self.followers)
        self.followers.wait_until_ready(TIMEOUT_S)

    def close(self) -> None:
        self.peers.close()  # which tells the followers
        self._ends.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        self.followers.close()
        super().close()
        if self.follower_errors:
            raise self.follower_errors[0]

    def _join(self, rank: int) -> Group:
        stage = self._deployment.stage(self._home)
        sizes = stage.tensor_parallel_size, stage.pipeline_parallel_size
        return join(self._store, rank, *sizes, CPU, TIMEOUT_S)

    def _load(self, group: Group) -> Engine:
        return load_engine(self._deployment, self._deployment.stage(self._home), CPU, group)

    def _serve(self, context: "zmq.Context[zmq.Socket[bytes]]", engine: Engine) -> tuple[PeerServer, PoolLayout]:
        layout = pool_layout(engine, fingerprint(engine.spec, self._deployment.model))
        addresses = [rank_address(self.address, rank) for rank in range(engine.group.size)]
        server = PeerServer(context, addresses[engine.group.rank], engine.pool, layout, rank_addresses=addresses)
        return server, layout

    def _follow(self, rank: int) -> None:
        context = zmq.Context()
        try:
            group = self._join(rank)
            engine = self._load(group)
            server, layout = self._serve(context, engine)
            peers = Peers(context, CPU, layout, rank=rank)
            socket = connect_to_leader(context, self._group_address, rank)
            host_kv_bytes = loop_settings(self._deployment, self._home).host_kv_bytes
            follower = Follower(rank, engine, host_kv_bytes, peers, server, socket, Progress())
            follower.start()
            while not self._ends.is_set():
                follower.serve_once(timeout_s=0.01)
            peers.close()
            server.close()
            socket.close(linger=0)
            context.term()
        except BaseException as error:
            self.follower_errors.append(error)


class GroupPair(Pair):
    """One replica for prompts and one for sequences, of several ranks each, or of one."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        make = {
            home: GroupReplica if deployment.stage(home).num_ranks > 1 else Replica for home in ("prefill", "decode")
        }
        self.prefill = make["prefill"](deployment, "prefill", f"ipc://{run_dir}/prefill")
        self.decode = make["decode"](deployment, "decode", f"ipc://{run_dir}/decode")
