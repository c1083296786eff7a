"""A machine, or a stub, that stands still for more than a second costs time and no answer."""

import json
import os
import shutil
import signal
import threading
import time
import urllib.request

import psutil
import pytest

from ensemble.serving.heartbeat import read_heartbeats
from tests.serving.test_cancel import wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

PAUSE_S = 1.5  # release 24.10 gives a stub up after one
NUM_CLIENTS = 4
REQUEST = json.dumps({"text_input": "Once upon", "max_tokens": 4, "temperature": 0}).encode()


def answer(server: TritonServer) -> str:
    with urllib.request.urlopen(f"{server.http_url}/v2/models/ensemble/generate", REQUEST, timeout=30) as response:
        return json.load(response)["text_output"]


def pause(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(shutil.which("cc") is None, reason="without a C compiler the Triton server has no guard")
@pytest.mark.parametrize("stalled", ["answer", "scheduler", "all"])
def test_what_stands_still_for_a_moment_loses_nothing(tiny_server: TritonServer, stalled: str) -> None:
    expected = answer(tiny_server)
    done = threading.Event()
    answers: list[str | Exception] = []

    def ask() -> None:
        while not done.is_set():
            try:
                answers.append(answer(tiny_server))
            except Exception as error:
                answers.append(error)
                return

    clients = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    own = psutil.Process(tiny_server.pid)
    every = [own.pid, *(child.pid for child in own.children(recursive=True))]
    stubs = {beat.model: beat.pid for beat in read_heartbeats(tiny_server.run_dir).values()}
    for _ in range(2):
        time.sleep(0.3)
        pause(every if stalled == "all" else [stubs[stalled]])
    num_before = len(answers)
    try:
        wait_until(lambda: len(answers) > num_before, 30.0)
    finally:
        done.set()
    for client in clients:
        client.join()
    assert tiny_server.poll() is None
    assert all(each == expected for each in answers), [each for each in answers if each != expected][:3]
