import pytest
import torch

from kernels.decode_plan import decode_workspace, list_length, plan_decode

PROGRAMS = 528  # shares that a large batch is cut into


@pytest.mark.parametrize("num_kv_heads", [1, 40])
@pytest.mark.parametrize(
    "lens",
    [[1], [100_000], [0, 0, 0], [500] * 31 + [16_000], [64 * i for i in range(130)]],
    ids=lambda lens: f"{len(lens)}_to_{max(lens)}",
)
def test_plan_covers_every_position_once_in_even_shares(lens, num_kv_heads, device):
    workspace = decode_workspace(len(lens) + 3, num_kv_heads, num_kv_heads, 64, device)
    plan_decode(workspace, torch.tensor(lens, dtype=torch.int32, device=device))
    num_items = list_length(len(lens), num_kv_heads)
    items = [item for item in workspace.items[:num_items].tolist() if item[0] >= 0]
    covered = {seq: [] for seq in range(len(lens))}
    for index, (seq, start, end, first, count, *_) in enumerate(items):
        assert first <= index < first + count
        covered[seq].append((start, end))
    for seq, length in enumerate(lens):
        starts, ends = zip(*covered[seq], strict=True)
        assert starts == (0, *ends[:-1])
        assert ends[-1] == length
    fair = sum(lens) * num_kv_heads / PROGRAMS
    assert max(end - start for _, start, end, *_ in items) <= 2 * fair + 4 * 64
