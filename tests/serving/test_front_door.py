"""The scheduler's front door, from its first moment on."""

from typing import Any

import pytest

from ensemble.config import Deployment
from ensemble.serving.front_door import FrontDoor
from tools.proofs.gpu_smoke import write_model_dir
from tools.server.tiny_server import TINY_MODEL


class Reached(Exception):
    pass


def test_a_router_that_reports_at_once_finds_the_door_ready(tmp_path, monkeypatch) -> None:
    """Its thread runs while the door is still being made: on a busy machine it was first, and the start failed."""

    def router(*arguments: Any) -> None:
        on_serving = arguments[-1]
        on_serving(False)
        raise Reached

    monkeypatch.setattr("ensemble.serving.front_door.RouterThread", router)
    write_model_dir(tmp_path / "model", TINY_MODEL)
    stage = {"devices": ["cpu"]}
    deployment = Deployment.parse({"model": {"path": tmp_path / "model"}, "prefill": stage, "decode": stage})
    with pytest.raises(Reached):
        FrontDoor(deployment, lambda *arguments: None)
