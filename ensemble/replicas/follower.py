"""A rank of a replica that is not its first: it carries out what its leader says, on its own part of model and pool."""

from collections import deque

import zmq

from ensemble.cache.block_manager import Swap
from ensemble.cache.swapper import Swapper, make_host_pool
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.engine import Engine, Launched
from ensemble.errors import LinkBroken
from ensemble.protocol.curve import CurveKey, connect
from ensemble.protocol.leader_follower import (
    Answer,
    Attached,
    AttachReplica,
    BeginLife,
    Copied,
    CopyBlocks,
    DetachReplica,
    EndLease,
    GrantLease,
    Order,
    Ready,
    RunStep,
    StartPull,
    StartSwap,
    StepLogProbs,
    decode_order,
    encode,
)
from ensemble.replicas.peer_server import PeerServer
from ensemble.replicas.peers import Peers
from ensemble.replicas.progress import Progress
from ensemble.request import Sequence
from ensemble.transfer.leases import FollowedLeases
from ensemble.transfer.puller import Pull, Puller

IDLE_POLL_S = 0.5  # between two beats
COPY_POLL_S = 1e-3  # while a copy is under way


def connect_to_leader(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, rank: int, key: CurveKey | None = None
) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    socket.identity = b"%d" % rank
    connect(socket, address, key)
    return socket


class Follower:
    """Its mirrors of the leader's sequences have the same tokens: it samples them itself."""

    def __init__(
        self,
        rank: int,
        engine: Engine,
        host_kv_bytes: int,
        peers: Peers,
        server: PeerServer,
        leases: FollowedLeases,  # by which the server reads
        socket: "zmq.Socket[bytes]",  # to the leader
        progress: Progress,
    ) -> None:
        self.rank = rank
        self.engine = engine
        self.peers = peers
        self.server = server
        self.leases = leases
        self.socket = socket
        self.progress = progress
        layout, pool = engine.pool.layout, engine.pool.tensor
        self._puller = Puller(pool)
        num_host_blocks = engine.group.smallest(host_kv_bytes // layout.block_bytes)
        self._swapper = Swapper(pool, make_host_pool(layout, num_host_blocks, pool.device))
        self._sequences: dict[int, Sequence] = {}  # request_id |-> mirror
        self._launched: deque[Launched] = deque()
        self._num_committed = 0  # steps
        self._num_launched = 0
        # In a pipeline, the first rank of the last place tells the leader of log-probabilities.
        is_asked = engine.is_pipeline and engine.group.pipeline.is_last and engine.group.tensor.rank == 0
        self._asked: deque[tuple[int, Launched]] | None = deque() if is_asked else None
        self._copies: dict[tuple[str, int], int] = {}  # way, request_id |-> copy_id

    def start(self) -> None:
        self._tell(Ready(rank=self.rank))

    def serve_once(self, timeout_s: float = IDLE_POLL_S) -> None:
        """What the leader has said, and then what has completed. Waits for either, at most `timeout_s`."""
        timeout_s = COPY_POLL_S if self._copies or self._asked else timeout_s
        zmq.select([self.socket, *self.peers.attaching], [], [], timeout_s)
        self.progress.beat()
        while self.socket.poll(0):
            self._carry_out(decode_order(self.socket.recv()))
            self.progress.beat()
            self._tell_log_probs()
        self._tell_log_probs()
        self._tell_of_copies()
        for address, reason in self.peers.receive_handles() if self.peers.attaching else []:
            self._tell(Attached(address=address, reason=reason))

    def _carry_out(self, order: Order) -> None:
        match order:
            case RunStep():
                self._run(order)
            case CopyBlocks(source_ids=source_ids, target_ids=target_ids):
                self.engine.pool.copy_blocks(source_ids, target_ids)
            case StartSwap(copy_id=copy_id, request_id=request_id, way=way):
                self._copies[way, request_id] = copy_id
                self._swapper.start(Swap(request_id, order.source_ids, order.target_ids), way)
            case StartPull(copy_id=copy_id, request_id=request_id):
                self._copies["pull", request_id] = copy_id
                source = self.peers.source(order.address)
                assert source is not None, "the leader waits for every rank to be attached"
                self._puller.start(Pull(request_id, source, order.source_ids, order.target_ids))
            case AttachReplica(address=address):
                self.peers.attach(address)
            case DetachReplica(address=address):
                self.peers.detach(address)
            case GrantLease(request_id=request_id, block_ids=block_ids):
                self.leases.grant(request_id, block_ids)
            case EndLease(request_id=request_id):
                self.leases.end(request_id)
            case BeginLife(life=life):
                self.server.life = life
                self.leases.forget_ended()
                self._tell(Ready(rank=self.rank))

    def _run(self, step: RunStep) -> None:
        while self._num_committed < step.num_committed:
            self.engine.commit(self._launched.popleft())
            self._num_committed += 1
        for request_id in step.gone:
            del self._sequences[request_id]
        for new in step.new_sequences:
            self._sequences[new.request.request_id] = Sequence(new.request, new.output_token_ids)
        for table in step.new_blocks:
            self._sequences[table.request_id].block_ids[table.first :] = table.block_ids
        prompts = [PrefillRow(self._sequences[request_id], start, length) for request_id, start, length in step.prompts]
        batch = Batch(prompts, [self._sequences[request_id] for request_id in step.decodes])
        self._launched.append(self.engine.launch(batch))
        if self._asked is not None and any(each.sampling.num_logprobs is not None for each in batch.sampled):
            self._asked.append((self._num_launched, self._launched[-1]))
        self._num_launched += 1

    def _tell_log_probs(self) -> None:
        while self._asked and self._asked[0][1].handle.is_done:
            number, launched = self._asked.popleft()
            launched.handle.token_ids()
            self._tell(StepLogProbs(step=number, log_probs=launched.handle.log_probs()))

    def _tell_of_copies(self) -> None:
        for swapped in self._swapper.completed():
            copy_id = self._copies.pop((swapped.way, swapped.request_id))
            self._tell(Copied(copy_id=copy_id, seconds=swapped.seconds))
        for pull in self._puller.completed():
            copy_id, error = self._copies.pop(("pull", pull.request_id)), pull.error
            reason = None if error is None else str(error)
            is_broken = isinstance(error, LinkBroken)
            self._tell(Copied(copy_id=copy_id, seconds=pull.seconds, error=reason, is_broken=is_broken))

    def _tell(self, answer: Answer) -> None:
        """Raises zmq.Again when the leader takes nothing for too long: it hangs, and the process ends."""
        self.socket.send(encode(answer), zmq.NOBLOCK)
