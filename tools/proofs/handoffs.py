"""KV by CUDA IPC from each of some devices to each other one, and between one rank and two.

Each reading rank is a process of its own, as in service: a process maps a pool for one of its devices only. Two that
read at once start at one moment, and the time is until the later one has ended.
"""

import json
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from types import TracebackType
from typing import Any

import torch

from ensemble.transfer.puller import Pull
from tools.benchmarks.transports import LAYOUTS, REPEATS, Reader, contiguous_rate, pulled, source_ranks
from tools.proofs.gpu_smoke import free_memory
from tools.proofs.sections import Row, failed

UNEQUAL_GOAL = 0.85  # of a contiguous copy
# For a process to answer; until they begin: after 20 ms of rest a pull takes 0.2 ms longer (0.69 to 0.82 of the copy
# instead of 0.83 to 0.87, four H200), and a GPU that serves has none.
ANSWER_S, AHEAD_S = 120.0, 0.004


class ReaderProcess:
    """One reading rank, as a context manager. It answers each line of JSON with another."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "tools.proofs.handoffs", device]
        self._device = device
        # Unbuffered: an answer in a buffer would not be seen by `select`.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._number = 0  # of the last question

    def __enter__(self) -> "ReaderProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def send(self, what: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._number += 1
        question = json.dumps({"what": what, "number": self._number} | arguments)
        self._process.stdin.write(f"{question}\n".encode())

    def heard(self) -> float:
        """The answer to the last question. Raises RuntimeError with what went wrong there, TimeoutError."""
        stdout = self._process.stdout
        assert stdout is not None
        while True:
            if not select.select([stdout], [], [], ANSWER_S)[0]:
                raise TimeoutError(f"the reader on {self._device} did not answer within {ANSWER_S:g} s")
            line = stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"number": self._number, "error": "it ended"}
            if answer["number"] == self._number:  # else it is of a pair that failed
                break
        if "error" in answer:
            raise RuntimeError(f"the reader on {self._device}: {answer['error']}")
        return float(answer["time"])


def handoffs(devices: Sequence[str]) -> Iterator[Row]:
    """Of four devices."""
    numbers = range(len(devices))
    with ExitStack() as stack:
        readers = [stack.enter_context(ReaderProcess(device)) for device in devices]
        for source in numbers:
            others = [each for each in numbers if each != source]
            with source_ranks(devices[source]) as address:
                for targets in ([others[0]], [others[1]], [others[2]], others[-2:]):
                    yield pulled_row(address, [source], targets, devices, readers)
        for sources in ([0, 1], [2, 3]):
            with source_ranks(*(devices[each] for each in sources)) as address:
                for target in (each for each in numbers if each not in sources):
                    yield pulled_row(address, sources, [target], devices, readers)
    free_memory()


def pulled_row(
    address: str, sources: Sequence[int], targets: Sequence[int], devices: Sequence[str], readers: list[ReaderProcess]
) -> Row:
    """KV of 512 tokens, beside a contiguous copy of as much from the first source to the first target."""
    is_equal = len(sources) == len(targets)
    names = [" and ".join(devices[each] for each in group) for group in (sources, targets)]
    name = f"hand-off, {names[0]} to {names[1]}: {'equal' if is_equal else 'unequal'} layouts"
    source, target = (torch.device(devices[group[0]]) for group in (sources, targets))
    layout, num_blocks = LAYOUTS[target.type]
    try:
        reading = [readers[each] for each in targets]
        for rank, reader in enumerate(reading):
            reader.send("attach", address=address, rank=rank, num_ranks=len(reading))
        for reader in reading:
            reader.heard()
        pull_s(reading)
        seconds = median(pull_s(reading) for _ in range(REPEATS))
        for reader in reading:
            reader.send("close")
        for reader in reading:
            reader.heard()
        row = {"name": name, **pulled(seconds, num_blocks * layout.block_bytes, contiguous_rate(source, target))}
    except Exception as error:  # the other pairs' results are worth having
        return failed(name, error)
    if is_equal or target.type == "cpu":
        return row
    return row | {"goal": UNEQUAL_GOAL, "met": row["value"] >= UNEQUAL_GOAL}


def pull_s(reading: Sequence[ReaderProcess]) -> float:
    """Seconds of a pull by all at once. Raises RuntimeError for wrong bytes."""
    for reader in reading:
        reader.send("prepare")
    for reader in reading:
        reader.heard()
    begin = time.perf_counter() + AHEAD_S  # of one clock for all processes
    for reader in reading:
        reader.send("pull", begin=begin)
    return max(reader.heard() for reader in reading) - begin


def read(device: torch.device) -> None:
    """What such a process does."""
    readers: list[Reader] = []
    pulls: list[Pull] = []
    address, num_blocks = "", LAYOUTS[device.type][1]

    def carry_out(question: dict[str, Any]) -> float:
        nonlocal address
        match question["what"]:
            case "attach":
                address = question["address"]
                while readers:  # of a pair that failed
                    readers.pop().close()
                readers.append(Reader(device, "cuda_ipc", question["rank"], question["num_ranks"]))
                if reason := readers[0].attach(address):
                    raise RuntimeError(reason)
            case "prepare":
                pulls[:] = [readers[0].prepared(address, num_blocks)]
            case "pull":
                while time.perf_counter() < question["begin"]:
                    pass
                readers[0].run(pulls[0])
                end = time.perf_counter()
                readers[0].check(pulls[0])
                return end
            case "close":
                pulls.clear()
                readers.pop().close()
        return time.perf_counter()

    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: dict[str, Any] = {"time": carry_out(question)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer | {"number": question["number"]}), flush=True)


if __name__ == "__main__":
    random.seed(0)
    place = torch.device(sys.argv[1])
    if place.type == "cuda":
        torch.cuda.set_device(place)
    read(place)
