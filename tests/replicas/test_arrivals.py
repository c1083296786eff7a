"""In which order what comes from other replicas is let in."""

from types import SimpleNamespace

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache, block_hashes
from ensemble.protocol.router_replica import Arrival, KVHandoff
from ensemble.replicas.arrivals import Arrivals
from ensemble.request import Request, SamplingParams
from ensemble.transfer.puller import Source


class Peers:
    def __init__(self):
        self.acknowledged = []

    def attach(self, address):
        pass

    def source(self, address):
        return Source([], {}, {}, address, 0, 100)

    def acknowledge(self, handoff):
        self.acknowledged.append(handoff.request_id)


def test_a_prefix_does_not_wait_behind_a_sequence_that_waits_for_blocks():
    blocks, peers, pulls = PrefixCache(BlockManager(8, 4)), Peers(), []
    blocks.allocate(Owner("sequence", 0), 4)
    puller = SimpleNamespace(start=pulls.append, num_in_flight=0, completed=list)
    arrivals = Arrivals(blocks, peers, puller)

    def handoff(request_id, num_blocks):
        return KVHandoff(
            request_id=request_id,
            source="there",
            life=0,
            num_kv_tokens=4 * num_blocks,
            block_ids=list(range(num_blocks)),
        )

    for request_id, num_blocks in ((1, 6), (2, 1)):  # the second, which would fit, stays behind the first
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(range(4 * num_blocks)),
            sampling=SamplingParams(max_tokens=2),
        )
        arrivals.receive(Arrival(request=request, output_token_ids=[5], handoff=handoff(request_id, num_blocks)))
    arrivals.receive_prefix(handoff(3, 2), block_hashes(range(50, 58), 4))
    arrivals.start_pulls(lambda num_blocks: num_blocks <= blocks.num_free_blocks)
    assert arrivals.num_wanted_blocks == 6 and not pulls
    (pulled,) = arrivals.ended().prefixes  # it would take what the first one waits for
    assert (pulled.lease_id, pulled.num_tokens) == (3, 0) and pulled.reason
    assert peers.acknowledged == [3]

    blocks.free(Owner("sequence", 0))
    arrivals.receive_prefix(handoff(4, 1), block_hashes(range(50, 54), 4))
    arrivals.start_pulls(lambda num_blocks: num_blocks <= blocks.num_free_blocks)
    assert [pull.request_id for pull in pulls] == [1, 2, 4]
