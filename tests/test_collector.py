"""A collection of cycles does not look at what a process keeps for good, and still ends what comes later."""

import gc
import subprocess
import sys
import weakref

import pytest

from ensemble.interpreter import settle_interpreter

MEASURE = """
import gc, time
from ensemble.interpreter import settle_interpreter

kept = [[number] for number in range(500_000)]

def seconds():
    start = time.process_time()
    gc.collect()
    return time.process_time() - start

before = min(seconds() for _ in range(3))
settle_interpreter()
print(min(seconds() for _ in range(3)) / before)
"""


def test_what_is_kept_is_not_looked_at_again() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 0.2


@pytest.fixture
def frozen():
    settle_interpreter()
    yield
    gc.unfreeze()


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_that_come_later_are_collected(frozen) -> None:
    knot = weakref.ref(Knot())
    gc.collect()
    assert knot() is None
