"""A replica of any number of ranks in one process: whoever made it runs the leader, a thread runs each follower."""

import threading

import torch
import zmq
from torch import distributed as dist

from ensemble.config import Deployment, StageName
from ensemble.engine.engine import Engine, load_engine
from ensemble.models.fingerprint import fingerprint
from ensemble.parallel.group import Group, join
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.follower import Follower, connect_to_leader
from ensemble.replicas.followers import Followers
from ensemble.replicas.group_parts import GroupLeases, GroupPeers
from ensemble.replicas.loop import EngineLoop
from ensemble.replicas.loop_settings import loop_settings
from ensemble.replicas.peer_server import PeerServer, pool_layout, rank_address
from ensemble.replicas.peers import Peers
from ensemble.replicas.progress import Progress
from ensemble.transfer.leases import FollowedLeases, Leases

CPU = torch.device("cpu")
TIMEOUT_S = 60.0  # for a rank that does not come
POLL_S = 0.01


class RankThreads:
    """On the CPU. `address` is where other replicas find it."""

    def __init__(self, deployment: Deployment, home: StageName, address: str) -> None:
        self._deployment, self._home, self._address = deployment, home, address
        self._stage = deployment.stage(home)
        self._size = self._stage.num_ranks
        self._orders_address = f"{address}.orders"
        self._store = dist.HashStore()  # type: ignore[attr-defined]
        self._ends = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._follow, args=(rank,), daemon=True) for rank in range(1, self._size)
        ]
        for thread in self._threads:
            thread.start()
        self.context = zmq.Context()
        self._followers = Followers(self.context, self._orders_address, self._size - 1) if self._threads else None
        self.engine = self._load(0)
        leases = Leases() if self._followers is None else GroupLeases(self._followers)
        self.server, layout = self._serve(self.context, self.engine, leases)
        pool, transfer = self.engine.pool.tensor, deployment.transfer
        self.peers = Peers(self.context, pool, layout, transfer)
        if self._followers is not None:
            self.peers = GroupPeers(self.context, pool, layout, transfer, self._followers)
        settings = loop_settings(deployment, home)
        self.loop = EngineLoop(self.engine, self.peers, settings, address, self._followers, leases=leases)
        if self._followers is not None:
            self._followers.wait_until_ready(TIMEOUT_S)

    def close(self) -> None:
        """Ends it. Raises the first error of a follower."""
        self.peers.close()
        self._ends.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        if self._followers is not None:
            self._followers.close()
        self.server.close()
        self.context.term()
        if self._errors:
            raise self._errors[0]

    def _load(self, rank: int) -> Engine:
        group = Group()
        if self._size > 1:
            sizes = self._stage.tensor_parallel_size, self._stage.pipeline_parallel_size
            group = join(self._store, rank, *sizes, CPU, TIMEOUT_S)
        return load_engine(self._deployment, self._stage, CPU, group)

    def _serve(
        self, context: "zmq.Context[zmq.Socket[bytes]]", engine: Engine, leases: Leases
    ) -> tuple[PeerServer, PoolLayout]:
        layout = pool_layout(engine, fingerprint(engine.spec, self._deployment.model))
        addresses = [rank_address(self._address, rank) for rank in range(self._size)]
        own = addresses[engine.group.rank]
        server = PeerServer(context, own, engine.pool, layout, rank_addresses=addresses, leases=leases)
        return server, layout

    def _follow(self, rank: int) -> None:
        context = zmq.Context()
        try:
            engine = self._load(rank)
            leases = FollowedLeases(self._deployment.transfer.timeout_s / 2)
            server, layout = self._serve(context, engine, leases)
            peers = Peers(context, engine.pool.tensor, layout, self._deployment.transfer, rank=rank)
            socket = connect_to_leader(context, self._orders_address, rank)
            host_kv_bytes = loop_settings(self._deployment, self._home).host_kv_bytes
            follower = Follower(rank, engine, host_kv_bytes, peers, server, leases, socket, Progress())
            follower.start()
            while not self._ends.is_set():
                follower.serve_once(POLL_S)
            peers.close()
            server.close()
            socket.close(linger=0)
            context.term()
        except BaseException as error:
            self._errors.append(error)
