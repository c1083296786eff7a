"""A rank that computes nothing; called as ensemble.replicas.worker is, after the folder in which it says so.

It beats, unless a file of that folder, fail-RANK, wants its end.
"""

import os
import sys
import threading
import time
from pathlib import Path

from ensemble.replicas.progress import Progress


def main() -> None:
    folder, *arguments, alive_fd, progress_fd = sys.argv[1:]
    threading.Thread(target=lambda: (os.read(int(alive_fd), 1), os._exit(0)), daemon=True).start()
    _, replica, life, rank, *_ = arguments
    draft = Path(folder) / f"draft-{os.getpid()}"
    draft.write_text(" ".join([str(os.getpid()), *arguments]))
    draft.rename(Path(folder) / f"{replica}-{life}-{rank}")
    if (Path(folder) / f"fail-{rank}").exists():
        os._exit(3)
    progress = Progress(int(progress_fd))
    progress.step_takes(0.25)
    while True:
        progress.beat()
        time.sleep(0.01)


main()
