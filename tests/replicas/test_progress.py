"""Who stands still is found out, who is slow or was stopped together with its watcher is left alone."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from ensemble.config import Deployment
from ensemble.engine.engine import Engine
from ensemble.engine.step_handle import StepHandle
from ensemble.protocol.router_replica import ReplicaUp
from ensemble.replicas.progress import HangWatch, Progress
from ensemble.replicas.worker import Worker
from ensemble.request import Request, SamplingParams
from ensemble.scheduling.estimator import StepShape, TimedStep
from tests.checkpoints import make_tiny_llama
from tests.replicas.pair import Replica, whole_prompts

HANG_TIMEOUT_S = 10.0


@pytest.fixture
def progress() -> Progress:
    return Progress()


def look(watch: HangWatch, progress: Progress, start: float, end: float) -> dict[object, float]:
    """Looks twice a second within [start, end); returns what it saw first, with the time."""
    for half_seconds in range(round(2 * start), round(2 * end)):
        hung = watch.hung({"replica": progress}, half_seconds / 2)
        if hung:
            return {**hung, "at": half_seconds / 2}
    return {}


def test_beats_of_another_process_are_seen(progress: Progress) -> None:
    program = (
        "import sys; from ensemble.replicas.progress import Progress; progress = Progress(int(sys.argv[1]));"
        "[progress.beat() for _ in range(1000)]; progress.step_takes(0.25)"
    )
    subprocess.run([sys.executable, "-c", program, str(progress.fd)], pass_fds=[progress.fd], check=True)
    assert (progress.beats, progress.step_s) == (1000, 0.25)


def test_who_stands_still_is_hung_after_the_timeout(progress: Progress) -> None:
    assert look(HangWatch(HANG_TIMEOUT_S), progress, 0, 60) == {"replica": HANG_TIMEOUT_S, "at": HANG_TIMEOUT_S}


def test_a_beat_starts_the_clock_again(progress: Progress) -> None:
    watch = HangWatch(HANG_TIMEOUT_S)
    for start in range(0, 45, 9):
        assert look(watch, progress, start, start + 9) == {}
        progress.beat()
    assert look(watch, progress, 45, 90) == {"replica": HANG_TIMEOUT_S, "at": 45 + HANG_TIMEOUT_S}


def test_a_step_may_take_ten_times_what_steps_took(progress: Progress) -> None:
    progress.step_takes(3.0)
    assert look(HangWatch(HANG_TIMEOUT_S), progress, 0, 60) == {"replica": 30.0, "at": 30.0}


def test_one_long_step_is_forgotten(progress: Progress) -> None:
    progress.step_takes(60.0)
    for _ in range(100):
        progress.step_takes(0.01)
    assert look(HangWatch(HANG_TIMEOUT_S), progress, 0, 60)["at"] == HANG_TIMEOUT_S


def test_a_late_watcher_does_not_judge(progress: Progress) -> None:
    watch = HangWatch(HANG_TIMEOUT_S)
    assert look(watch, progress, 0, 9) == {}
    assert look(watch, progress, 30, 40) == {}, "it has not watched for long enough since it stood still"
    assert look(watch, progress, 40, 60) == {"replica": HANG_TIMEOUT_S, "at": 40.0}


def test_each_has_its_own_clock() -> None:
    watch, alive, dead = HangWatch(HANG_TIMEOUT_S), Progress(), Progress()
    for half_seconds in range(60):
        alive.beat()
        hung = watch.hung({"alive": alive, "dead": dead}, half_seconds / 2)
        assert set(hung) == ({"dead"} if half_seconds / 2 >= HANG_TIMEOUT_S else set())


def test_a_new_process_is_not_judged_by_the_clock_of_the_one_before() -> None:
    watch = HangWatch(HANG_TIMEOUT_S)
    for half_seconds in range(18):
        watch.hung({(0, 0): Progress()}, half_seconds / 2)
    assert look(watch, Progress(), 9, 18) == {}


def test_who_waits_for_another_process_beats_meanwhile_and_no_longer(progress: Progress) -> None:
    deadline = time.monotonic() + 20
    with progress.waiting():
        while progress.beats < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert progress.beats >= 2
    assert not progress._waits


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def worker(progress: Progress, device: torch.device, tmp_path: Path) -> Iterator[Worker]:
    stage = {"devices": [str(device)], "kv_cache_bytes": 1 << 20}
    raw = {"model": {"path": make_tiny_llama(tmp_path / "model")}, "prefill": stage, "decode": stage}
    replica = Replica(Deployment.parse(raw), "prefill", f"ipc://{tmp_path}/peer", device)
    up = ReplicaUp(
        replica=0,
        life=0,
        device=str(device),
        num_blocks=replica.engine.pool.num_blocks,
        num_host_blocks=0,
        num_places=4,
        pid=0,
        peer_address=replica.address,
    )
    socket = replica.context.socket(zmq.DEALER)
    socket.connect(f"ipc://{tmp_path}/stage")
    yield Worker(replica.loop, socket, replica.server, progress, up)
    socket.close(linger=0)
    replica.close()


def test_a_gpu_that_stands_still_with_prompts_alone_is_found_out(
    worker: Worker, progress: Progress, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host, which waits for it, does nothing else; what it tells of itself then is not its own progress."""
    has_run = False
    if device.type == "cpu":  # looks like a GPU
        monkeypatch.setattr(Engine, "runs_ahead", True)
        monkeypatch.setattr(StepHandle, "is_done", property(lambda self: has_run))
    else:
        torch.cuda._sleep(8_000_000_000)  # some four seconds
    worker.loop.estimator.learn([TimedStep(StepShape.of([(0, 9)], []), 2.92)])
    request = Request(request_id=1, prompt_token_ids=[5] * 9, sampling=SamplingParams(max_tokens=5))

    worker.loop.handle(whole_prompts([request]))
    worker.serve_once()
    assert worker.loop.waits_for_gpu
    beats = progress.beats
    for _ in range(20):
        worker.serve_once()
    assert progress.beats == beats
    assert look(HangWatch(HANG_TIMEOUT_S), progress, 0, 60) == {"replica": 29.5, "at": 29.5}, "ten times 2.92 s"
    has_run = True
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    worker.serve_once()
    worker.serve_once()
    assert progress.beats > beats
    assert worker.loop.leases.why_not(1, []) is None, "the prompt has been computed, and is handed off"


def test_steps_that_end_as_soon_as_they_are_waited_for_are_beats(
    worker: Worker, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the host looks: with steps of a second, ten in a row that it missed were a hang."""
    looks: list[bool] = []

    def ends_after_a_look(self: StepHandle) -> bool:
        looks.append(len(looks) % 2 == 1)
        return looks[-1]

    monkeypatch.setattr(Engine, "runs_ahead", True)
    monkeypatch.setattr(StepHandle, "is_done", property(ends_after_a_look))
    request = Request(request_id=1, prompt_token_ids=[5] * 9, sampling=SamplingParams(max_tokens=5))
    worker.loop.handle(whole_prompts([request]))
    worker.serve_once()
    beats = progress.beats
    while 1 not in worker.loop.leases:
        worker.serve_once()
    assert progress.beats > beats and looks == [False, True]
