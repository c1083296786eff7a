"""NVIDIA's genai-perf, with a perf_analyzer to run: arguments are passed on as they are.

    python -m tools.genai_perf profile -m NAME --endpoint-type chat --url localhost:9000 --streaming --tokenizer DIR

It has to be on PATH (`pip install genai-perf`, in an environment of its own: it brings packages that we cannot have).
What the package index has as perf_analyzer is a placeholder, so it gets ours (perf_analyzer.py).
"""

import os
import shutil
import sys

from tools.installation.cache import DownloadError
from tools.perf_analyzer import ensure_perf_analyzer


def environment() -> dict[str, str]:
    """In which genai-perf finds a perf_analyzer. Raises DownloadError."""
    program, variables = ensure_perf_analyzer()
    return {**variables, "PATH": f"{program.parent}:{os.environ['PATH']}"}


if __name__ == "__main__":
    found = shutil.which("genai-perf")
    if found is None:
        sys.exit("error: no genai-perf on PATH. Run: pip install genai-perf, in an environment of its own")
    try:
        os.execve(found, [found, *sys.argv[1:]], environment())
    except (OSError, DownloadError) as error:
        sys.exit(f"error: {error}")
