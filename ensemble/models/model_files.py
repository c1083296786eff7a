"""The files of a model directory: which of them hold its weights, and what the directory is if none does.

Which file counts is as in transformers: one complete file before an index of several, safetensors before `.bin`.
"""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

from ensemble.errors import ModelError

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # by preference; several have NAME.index.json
_LFS_POINTER = b"version https://git-lfs"

# Patterns of files |-> what a directory with them, and without weights of ours, is.
_OTHER_FORMATS = {
    "*.gguf": "holds a GGUF model, which llama.cpp reads",
    "adapter_config.json": "holds an adapter (LoRA) and not a model: merge it into its base model",
    "tf_model*.h5": "holds TensorFlow weights alone",
    "flax_model*.msgpack": "holds Flax weights alone",
    "consolidated*": "holds weights in their maker's own format: convert them for transformers",
    "*.engine": "holds a TensorRT engine",
    "*.onnx": "holds an ONNX model",
    "model_index.json": "holds a diffusion pipeline",
}
WANTED = "a Hugging Face directory is needed, with config.json and safetensors or .bin files"


def other_format(names: Iterable[str]) -> str | None:
    """What a directory or repository with these files holds instead of weights of ours; None: nothing known."""
    names = sorted(names)
    for pattern, meaning in _OTHER_FORMATS.items():
        if found := fnmatch.filter(names, pattern):
            return f"{meaning} ({found[0]})"
    return None


def what_it_is(path: Path) -> str:
    """Says of a path that is no checkpoint what it is instead, and what is needed."""
    if not path.exists():
        return "no such directory"
    if not path.is_dir():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        return f"is {kind}; {WANTED}"
    names = sorted(file.name for file in path.iterdir())
    if other := other_format(names):
        return f"{other}; {WANTED}"
    if not names:
        return f"is empty; {WANTED}"
    if "config.json" not in names:
        models = sorted(path.glob("*/config.json")) or sorted(path.glob("snapshots/*/config.json"))
        instead = f"; {models[0].parent} has one" if models else ""
        return f"has no config.json{instead}; {WANTED}"
    variants = fnmatch.filter(names, "model.*.safetensors")
    instead = f"; {variants[0]} is a variant, which is not looked for" if variants else ""
    return f"has neither {' nor '.join(_SINGLE_FILES)}, nor an index of several{instead}"


def weight_files(path: Path) -> list[Path]:
    """The files of a model directory that are loaded, in order. Raises ModelError."""
    counts = what_counts(path)
    return sorted({path / name for name in weight_map(counts).values()}) if counts.suffix == ".json" else [counts]


def what_counts(path: Path) -> Path:
    """A file with all weights, or the index of several."""
    for name in _SINGLE_FILES:
        for file in (path / name, path / f"{name}.index.json"):
            if file.exists():
                return file
    raise ModelError(f"model path {path}: {what_it_is(path)}")


def weight_map(index: Path) -> dict[str, str]:
    """key |-> name of the file that holds it"""
    refuse_pointer(index)
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(file) for key, file in named.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read: {one_line(error)}") from None


def refuse_pointer(file: Path) -> bytes:
    """Raises ModelError for what git leaves of a large file that it has not fetched. Returns how the file begins."""
    try:
        with file.open("rb") as content:
            start = content.read(len(_LFS_POINTER))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {one_line(error)}") from None
    if start == _LFS_POINTER:
        raise ModelError(f"{file}: is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}")
    return start


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
