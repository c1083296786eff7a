"""A thread that the process cannot do without takes it along, and says why."""

import subprocess
import sys

PROGRAM = """
import threading
from ensemble.threads import start_vital_thread
start_vital_thread(lambda: {}["replica"], "decode-stage")
threading.Event().wait()
"""


def test_its_failure_ends_the_process_with_a_reason() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "distserve: error: thread decode-stage: KeyError: 'replica'"


def test_it_ends_the_process_also_where_the_log_cannot_be_written() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", PROGRAM], stderr=full, timeout=60)
    assert ended.returncode == 1
