"""What starts a rank on a node of a Ray cluster and watches it there: the code of an actor, of ray_cluster.py.

The rank is a process of its own, as on the stage's machine: one that stands still is seen, and can be killed. A warden
that is not asked how its rank gets on has lost its stage, and ends with its rank.
"""

import contextlib
import math
import os
import random
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import ray

from ensemble.config import DEPLOYMENT_VARIABLE, Deployment
from ensemble.errors import ConfigError
from ensemble.operator_log import tell_operator
from ensemble.protocol.curve import KEY_VARIABLE
from ensemble.replicas.launchers.base import WORKER
from ensemble.replicas.launchers.local import LocalRank

REPORT_S = 0.5  # between two reports, where nothing happens
STAGE_LOST_S = 10.0  # without a question
REACH_S = 5.0  # to connect to the stage


@dataclass(frozen=True, slots=True)
class Site:
    """Where a rank will run."""

    device: str
    peer_address: str
    group_address: str


@dataclass(frozen=True, slots=True)
class Report:
    beats: int
    step_s: float
    end: str | None  # how the process ended


class Warden:
    """Of one rank. Its methods run in threads of the actor; `host` is the node's address."""

    def __init__(self, host: str, deployment: str, key: str, program: Sequence[str] | None) -> None:
        self._host = host
        self._deployment = deployment
        self._key = key
        self._program = program or [sys.executable, *WORKER]
        self._folder = tempfile.TemporaryDirectory(prefix="distserve-rank-")  # mode 0700
        self._alive_fd, self._our_fd = os.pipe()  # the end of the pipe: this process is gone
        self._rank: LocalRank | None = None
        self._ending = threading.Lock()
        self._asked_at = math.inf  # until a rank runs
        threading.Thread(target=self._end_without_stage, name="stage-watch", daemon=True).start()

    def prepare(self, stage_address: str, device: str, num_ranks: int, spans_nodes: bool) -> Site:
        """num_ranks: of the replica. Raises ConfigError if none could work here."""
        model = Deployment.from_text(self._deployment).model
        if not model.path.is_dir():
            raise ConfigError(f"model.path = {model.path}: there is no such folder, which every node needs")
        stage = urlsplit(stage_address)
        try:
            socket.create_connection((stage.hostname, stage.port), timeout=REACH_S).close()
        except OSError as error:
            raise ConfigError(f"the stage at {stage_address} cannot be reached: {error}") from None
        port = _row_of_free_ports(self._host, num_ranks + 1)
        group = f"tcp://{self._host}:{port + num_ranks}" if spans_nodes else f"file://{self._folder.name}/group"
        return Site(_device_here(device), f"tcp://{self._host}:{port}", group)

    def start(self, arguments: list[str]) -> int:
        """Returns the process id."""
        deployment = Path(self._folder.name) / "deployment.yaml"
        deployment.write_text(self._deployment, encoding="utf-8")
        path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            DEPLOYMENT_VARIABLE: str(deployment),
            KEY_VARIABLE: self._key,
        }
        # Ranks see all GPUs, else none could map the memory of another one.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment.pop("OMP_NUM_THREADS", None)  # Ray's; the worker has its own number
        self._rank = LocalRank.start(self._program, arguments, self._alive_fd, environment)
        self._asked_at = time.monotonic()
        return self._rank.process.pid

    def report(self) -> Report:
        """As soon as the rank has ended, after REPORT_S at the latest."""
        self._asked_at = time.monotonic()
        rank = self._rank
        assert rank is not None
        if rank.process.returncode is None:
            poller = select.poll()
            poller.register(rank.exit_fd, select.POLLIN)
            if poller.poll(REPORT_S * 1e3):
                self.kill()
        has_ended = rank.process.returncode is not None
        return Report(rank.progress.beats, rank.progress.step_s, rank.how_it_ended if has_ended else None)

    def kill(self) -> None:
        """Returns when the rank has ended."""
        with self._ending:
            rank = self._rank
            if rank is not None and rank.process.returncode is None:
                rank.wait(0.0)
                rank.clean_up()
            self._folder.cleanup()

    def _end_without_stage(self) -> NoReturn:
        while time.monotonic() < self._asked_at + STAGE_LOST_S:
            time.sleep(REPORT_S)
        self.kill()
        tell_operator("the stage is lost: a rank ends")
        os._exit(1)


def _device_here(device: str) -> str:
    """A GPU is the one that Ray has given the actor; in the deployment its number is but a name."""
    if device == "cpu":
        return device
    [gpu] = ray.get_gpu_ids()
    if not str(gpu).isdecimal():
        raise ConfigError(f"CUDA_VISIBLE_DEVICES names {gpu}: Ray has to be started with numbers")
    return f"cuda:{gpu}"


def _row_of_free_ports(host: str, count: int) -> int:
    """The first of them. Should another process be faster than a rank, that ends, and its next life has others."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)  # below those of outgoing connections
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server((host, port)))
            return first
