"""What goes between the places of a pipeline: each kind in order, and none held up by another. Places are threads."""

import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.distributed import HashStore

from ensemble.parallel.group import join
from ensemble.parallel.pipeline import Pipeline

CPUS = [torch.device("cpu")] * 3
GPUS = [torch.device("cuda", index) for index in range(2)]
WAIT_S = 60.0


def run_places(devices: list[torch.device], work: Callable[[Pipeline, torch.device], None]) -> None:
    """At each place, on its device. Raises the first error."""
    store, errors = HashStore(), list[BaseException]()

    def run(place: int) -> None:
        device = devices[place]
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                pipeline = join(store, place, 1, len(devices), device, WAIT_S).pipeline
                work(pipeline, device)
                pipeline.smallest(0, device.type)  # none goes while another may still need it
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads), "a place waits for another for ever"
    for error in errors:
        raise error


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(CPUS[:2], id="two"),
        pytest.param(CPUS, id="three"),
        pytest.param(GPUS, id="two gpus", marks=pytest.mark.multigpu),
    ],
)
def test_hidden_states_do_not_wait_for_the_tokens_of_a_step_before(devices: list[torch.device]) -> None:
    """All steps' hidden states arrive before the first token is sent, though the places wait for tokens by then."""
    num_steps, num_tokens, hidden_size = 4, 65, 512
    sizes = [num_tokens - step for step in range(num_steps)]

    def work(pipeline: Pipeline, device: torch.device) -> None:
        arrived, tokens, sent = [], [], []
        for step, size in enumerate(sizes):
            hidden = torch.full((size, hidden_size), float(step), device=device)
            if not pipeline.is_first:
                hidden = pipeline.receive_hidden(size, hidden_size, torch.float32, step).wait()
            arrived.append(hidden)
            if pipeline.is_last:
                continue
            sent.append(pipeline.send_hidden(hidden + 1, step))
            tokens.append(pipeline.receive_tokens(torch.zeros(size, dtype=torch.int64, device=device), step))
        assert [float(hidden.mean()) for hidden in arrived] == [step + pipeline.place for step in range(num_steps)]
        if pipeline.is_last:
            sent = [
                pipeline.send_tokens(torch.full((size,), step, device=device), step) for step, size in enumerate(sizes)
            ]
        for step, coming in enumerate(tokens):
            assert coming.wait().tolist() == [step] * sizes[step]
        for each in sent:
            each.wait()

    run_places(devices, work)


@pytest.mark.multigpu
def test_hidden_states_come_while_a_gpu_is_at_another_step() -> None:
    """The sender's GPU is done with them before the receiver's has ended what it was at."""
    has_sent, shape = threading.Event(), (2048, 5120)

    def work(pipeline: Pipeline, device: torch.device) -> None:
        if pipeline.is_first:
            for step in range(2):  # the first one takes memory and connects the two
                pipeline.send_hidden(torch.full(shape, float(step), device=device), step).wait()
                torch.cuda.synchronize(device)
            has_sent.set()
            return
        assert float(pipeline.receive_hidden(*shape, torch.float32, 0).wait().mean()) == 0.0
        torch.cuda._sleep(6_000_000_000)  # some three seconds
        at_another_step = torch.cuda.Event()
        at_another_step.record()
        coming = pipeline.receive_hidden(*shape, torch.float32, 1)
        assert has_sent.wait(WAIT_S)
        assert not at_another_step.query()
        assert float(coming.wait().mean()) == 1.0

    run_places(GPUS, work)
