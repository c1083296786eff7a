"""Another system's records beside ours."""

import json

import pytest

from ensemble.errors import ConfigError
from tools.benchmarks.beside_peer import of_file, rows_of


def test_a_request_counts_if_it_ended_and_met_every_target(tmp_path):
    lines = [
        {"mode": "peer", "rate": 4, "seed": 0, "ok": True, "ttft": 0.2, "tpot": 0.01, "itl": 0.015},
        {"mode": "peer", "rate": 4, "seed": 1, "ok": True, "ttft": 0.2, "tpot": 0.01, "itl": 0.025},
        {"mode": "peer", "rate": 4, "seed": 1, "ok": True, "ttft": 1.2, "tpot": None, "itl": 0.0},
        {"mode": "peer", "rate": 4, "seed": 1, "ok": False, "ttft": None, "tpot": None, "itl": None},
    ]
    path = tmp_path / "peer.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    seen = list(of_file(path))
    rows = {row["name"]: row for row in rows_of(4.0, "peer", seen, [{"ttft": 1000.0, "itl": 20.0}, {"itl": 30.0}])}
    both = rows["4/s, peer: TTFT <= 1000 ms and ITL <= 20 ms"]
    assert both["value"] == 0.25 and both["unit"] == "of 4 requests, 2 seeds"
    assert rows["4/s, peer: ITL <= 30 ms"]["value"] == 0.75
    assert rows["4/s, peer: TTFT P50, P90, P99"]["value"][0] == 200.0


def test_a_line_that_is_no_record_is_named(tmp_path):
    (path := tmp_path / "peer.jsonl").write_text('{"mode": "peer", "rate": "fast"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        list(of_file(path))
