import pytest
import torch

from kernels import prefill_plan
from kernels.prefill_plan import plan_prefill, prefill_workspace

SHARES = 132  # that the tiles of a step are cut into, where they are

STEPS = {  # (queries, context) of each sequence
    "prompt": [(100, 100)],
    "chunk_and_rows": [(512, 1536), (1, 2000), (1, 1), (1, 63), (1, 64)],
    "long_prefix": [(256, 33_000)],
    "one_long_row": [(1, 100_000)],
    "empty_sequences": [(0, 0), (70, 130), (0, 50), (1, 300), (0, 0)],
    "many": [(i, 37 * i) for i in range(300)],
}


@pytest.mark.parametrize(
    ("name", "num_heads", "num_kv_heads"),
    [(name, *heads) for name in STEPS for heads in ([(32, 4)] if name == "many" else [(40, 40), (32, 4), (5, 1)])],
)
def test_items_are_every_query_and_key_once_in_even_shares(name, num_heads, num_kv_heads, device):
    query_lens, context_lens = zip(*STEPS[name], strict=True)
    num_tokens = sum(query_lens)
    workspace = prefill_workspace(num_tokens, len(query_lens), num_heads, num_kv_heads, 64, torch.float16, device)
    starts = torch.tensor([0, *query_lens], device=device).cumsum(0).int()
    plan_prefill(workspace, starts, torch.tensor(context_lens, dtype=torch.int32, device=device))
    num_items, num_ones = workspace.num_items.tolist()
    assert num_ones == sum(query_lens[item[0]] == 1 for item in workspace.items[:num_items].tolist())
    assert num_items <= workspace.max_num_items(num_tokens, len(query_lens)) <= len(workspace.items)

    blocks = {}
    for item in workspace.items[:num_items].tolist():
        seq, token, num_queries, position, start, end, slot, split, count, *_ = item
        blocks.setdefault((seq, token, num_queries, position), []).append((start, end, slot, split, count))
    queries = [[] for _ in query_lens]
    slots = []
    for (seq, token, num_queries, position), parts in blocks.items():
        assert position - (token - int(starts[seq])) == context_lens[seq] - query_lens[seq]
        queries[seq] += range(token - int(starts[seq]), token - int(starts[seq]) + num_queries)
        assert [split for *_, split, _ in parts] == list(range(len(parts)))
        assert {count for *_, count in parts} == {len(parts)}
        keys = [(start, end) for start, end, *_ in parts if start < end]
        assert [start for start, _ in keys] == [0, *[end for _, end in keys[:-1]]]
        assert keys[-1][1] == position + num_queries
        assert all(start % workspace.tile == 0 for start, _ in keys)
        if len(parts) > 1:
            assert [slot - split for _, _, slot, split, _ in parts] == [parts[0][2]] * len(parts)
            slots += [slot for _, _, slot, *_ in parts]
    assert [sorted(each) for each in queries] == [list(range(length)) for length in query_lens]
    assert len(set(slots)) == len(slots) and max(slots, default=0) < len(workspace.counters)

    lengths = [end - start for parts in blocks.values() for start, end, *_ in parts]
    fair = max(sum(lengths) * num_kv_heads / SHARES, prefill_plan._MIN_SHARE * workspace.tile)
    assert max(lengths) <= 2 * fair + 2 * workspace.tile
