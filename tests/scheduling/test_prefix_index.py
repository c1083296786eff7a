from copy import deepcopy

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache, block_hashes
from ensemble.scheduling.prefix_index import PrefixIndex

B = 4


def test_the_index_says_what_the_caches_would_find():
    caches = {replica: PrefixCache(BlockManager(4, B)) for replica in (0, 1)}
    index = PrefixIndex(B)
    prompts = [[token] * 12 for token in (1, 2, 3)] + [[1] * 8 + [2] * 5, [3] * 7]
    for request_id, prompt in enumerate(prompts * 2):
        cache, replica = caches[request_id % 2], request_id % 2
        owner = Owner("sequence", request_id)
        cache.allocate_prompt(owner, prompt, cache.blocks.blocks_for(len(prompt)))
        cache.commit(owner, len(prompt))
        cache.free(owner)
        index.update(replica, *cache.take_events())
        for other in prompts:
            hashes = block_hashes(other, B)
            for replica, cache in caches.items():
                found = deepcopy(cache).lease(Owner("transfer", 0), hashes)
                assert index.num_cached_tokens(replica, hashes, len(other)) == min(len(found) * B, len(other) - 1)


def test_a_lost_replica_holds_nothing():
    index = PrefixIndex(B)
    hashes = block_hashes([1] * 8, B)
    index.update(0, hashes, [])
    assert index.num_cached_tokens(0, hashes, 9) == 8
    index.replica_down(0)
    assert index.num_cached_tokens(0, hashes, 9) == 0
