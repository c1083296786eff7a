"""The same requests by NVIDIA's perf_analyzer: a client that others wrote, in C++."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tools.load.client_process import LoadError
from tools.load.records import Record
from tools.perf_analyzer import ensure_perf_analyzer

TIMEOUT_S = 3600.0
DRAIN_US = 5_000_000  # after the last arrival


def text_inputs(text: str, output_len: int) -> dict[str, Any]:
    """perf_analyzer's input data of one request to `ensemble`."""
    return {
        "text_input": [text],
        "max_tokens": [output_len],
        "min_tokens": [output_len],
        "temperature": [0.0],
        "ignore_eos": [True],
        "stream": [True],
        "return_num_output_tokens": [True],
    }


def drive(url: str, inputs: list[dict[str, Any]], gaps_s: list[float] | None, max_concurrency: int) -> list[Record]:
    """Sends each request once: after gaps from one to the next, or so many at once. Raises LoadError.

    The records have no prompt_len.
    """
    program, environment = ensure_perf_analyzer()
    with tempfile.TemporaryDirectory() as folder:
        data, export, intervals = (Path(folder) / name for name in ("inputs.json", "export.json", "intervals"))
        data.write_text(json.dumps({"data": inputs}), encoding="utf-8")
        load = ["--concurrency-range", str(max_concurrency)]
        if gaps_s:
            # In microseconds, the first before the first request. perf_analyzer begins anew after the last, and looks
            # only each second whether there have been enough: a pause, in which the answers are awaited.
            gaps_us = [*(max(1, round(1e6 * gap)) for gap in gaps_s), DRAIN_US]
            intervals.write_text("".join(f"{gap}\n" for gap in gaps_us), encoding="utf-8")
            load = ["--request-intervals", str(intervals)]
        command = [str(program), "-m", "ensemble", "-u", url, "-i", "grpc", "--async", "--streaming", *load]
        command += ["--input-data", str(data), "--profile-export-file", str(export), "--max-threads", "16"]
        command += ["--request-count", str(len(inputs)), "--stability-percentage", "999"]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LoadError(f"perf_analyzer against {url}: not done after {TIMEOUT_S:.0f} s") from None
        if result.returncode or not export.exists():
            said = (result.stderr or result.stdout).strip().splitlines()
            raise LoadError(f"perf_analyzer against {url}: {said[0] if said else result.returncode}")
        (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    requests = sorted(experiment["requests"], key=lambda each: each["timestamp"])[: len(inputs)]
    if len(requests) < len(inputs):
        raise LoadError(f"perf_analyzer against {url}: {len(requests)} of {len(inputs)} requests were served")
    return [as_record(each, requests[0]["timestamp"]) for each in requests]


def as_record(request: dict[str, Any], start_ns: int) -> Record:
    """From perf_analyzer's export."""
    sent = (request["timestamp"] - start_ns) / 1e9
    answers = [
        ((at_ns - start_ns) / 1e9, _number(outputs["num_output_tokens"]))
        for at_ns, outputs in zip(request["response_timestamps"], request["response_outputs"], strict=True)
        if "num_output_tokens" in outputs
    ]
    return Record(
        prompt_len=0,
        output_len=int(request["request_inputs"]["max_tokens"]),
        due=sent,
        sent=sent,
        times=[at for at, _ in answers],
        tokens=[number for _, number in answers],
    )


def _number(exported: int | str) -> int:
    """Of an INT32, which perf_analyzer exports as the characters of its four bytes."""
    is_bytes = isinstance(exported, str) and len(exported) == 4
    return int.from_bytes(str(exported).encode("latin-1"), "little") if is_bytes else int(exported)
