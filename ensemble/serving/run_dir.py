"""The private folder of one running server (mode 0700): its processes find one another there.

secret         what only processes of this run know (secret.py)
stubs/         signs of life, a file for each stub (heartbeat.py)
cancels        socket: the HTTP relay tells the scheduler of clients that have gone (cancels.py), the OpenAI front and
               the `answer` model of responses that they have handed over (handover.py)
answers        socket: instances of the `answer` model tell the scheduler of steps that start (answer_model.py)
answer-PID     socket: the scheduler tells such an instance what to send (answer_steps.py)
control        socket: an operator's commands to the scheduler (control.py)
"""

import os
import stat
import tempfile
from pathlib import Path

from ensemble.errors import ConfigError

RUN_DIR_VARIABLE = "DISTSERVE_RUN_DIR"


def run_dir() -> Path:
    """What the environment names; under a `tritonserver` that was started by hand a folder that all its stubs share.

    Raises ConfigError if that folder is somebody else's.
    """
    if RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    path = Path(tempfile.gettempdir()) / f"distserve-by-hand-{os.getppid()}"  # every stub's parent is the server
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path} is not a private folder of this user: set {RUN_DIR_VARIABLE} to one")
    return path


def cancel_address(of_run: Path) -> str:
    """Where the scheduler hears of cancels."""
    return f"ipc://{of_run}/cancels"


def answers_address(of_run: Path) -> str:
    """Where the scheduler hears of the steps of the `answer` model."""
    return f"ipc://{of_run}/answers"


def answer_address(of_run: Path, instance: int) -> str:
    """Where an instance of that model, a process, hears what to send."""
    return f"ipc://{of_run}/answer-{instance}"


def control_address(of_run: Path) -> str:
    """Where the scheduler takes an operator's commands."""
    return f"ipc://{of_run}/control"
