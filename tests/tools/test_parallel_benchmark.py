"""docs/results/parallel.json's benchmark: it runs on CPUs; a section that fails or hangs costs no other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.benchmarks.sections import Row, run_section

ROOT = Path(__file__).resolve().parents[2]


def test_two_places_are_measured_beside_one_rank(tmp_path: Path) -> None:
    output = tmp_path / "parallel.json"
    options = ["--devices", "cpu,cpu", "--only", "pp-prefill", "--only", "pp-decode", "--output", str(output)]
    command = [sys.executable, "-m", "tools.benchmarks.parallel", *options]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=280)
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    for measure in ("prefill, prompts in a row", "decode, rows in each micro-batch"):
        alone, two = (rows[f"tiny, {layout}: {measure}"]["value"] for layout in ("one rank", "pp=2"))
        assert abs(rows[f"pp=2: {measure}, against one rank"]["value"] - two / alone) < 1e-3
    assert not [row for row in rows.values() if row["met"] is False]


def fails_after_a_row() -> Iterator[Row]:
    yield {"name": "first"}
    raise ValueError("no more")


def hangs_with_a_child() -> Iterator[Row]:
    child = subprocess.Popen(["sleep", "1000"])
    yield {"pid": child.pid}
    time.sleep(1000)


def ends_at_once() -> Iterator[Row]:
    yield {"name": "first"}
    os._exit(3)


def test_a_section_that_fails_says_why_and_keeps_its_rows() -> None:
    rows: list[Row] = []
    assert run_section(fails_after_a_row, (), 60.0, rows.append) == "ValueError: no more"
    assert run_section(ends_at_once, (), 60.0, rows.append) == "its process ended: exit status 3"
    assert rows == [{"name": "first"}] * 2


def test_a_section_that_hangs_is_killed_with_what_it_has_started() -> None:
    rows: list[Row] = []
    assert run_section(hangs_with_a_child, (), 3.0, rows.append) == "not done in 3 s"
    stat = Path(f"/proc/{rows[0]['pid']}/stat")
    deadline = time.monotonic() + 10.0
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
