"""The folders of `ensemble` in order: each imports only from those below it, and can be read without the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top; those in a row do not import from each other.
LAYERS = [
    {"openai_front"},
    {"serving"},
    {"router", "replicas"},
    {"transfer"},
    {"engine"},
    {"models"},
    {"parallel"},
    {"cache"},
    {"protocol"},
    {"scheduling"},
]
HEIGHT = {folder: len(LAYERS) - index for index, row in enumerate(LAYERS) for folder in row}


def imports_of(path: Path) -> set[str]:
    """The modules that a file names in its imports, also those for types alone."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return modules | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def folder_of(module: str) -> str:
    """The folder of a module of `ensemble`; empty for the files beside the folders."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ensemble" and parts[1] in HEIGHT else ""


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in (ROOT / "ensemble").glob("*/__init__.py")}
    assert folders <= HEIGHT.keys()


@pytest.mark.parametrize("folder", sorted(HEIGHT))
def test_a_folder_imports_only_from_those_below_it(folder: str) -> None:
    upwards = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / "ensemble" / folder).rglob("*.py")
        for module in imports_of(path)
        if (other := folder_of(module)) and other != folder and HEIGHT[other] >= HEIGHT[folder]
    }
    assert upwards == set()


def test_the_files_beside_the_folders_import_from_none() -> None:
    files = (ROOT / "ensemble").glob("*.py")
    assert {
        f"{path.name} imports {module}" for path in files for module in imports_of(path) if folder_of(module)
    } == set()


def reached_from(module: str) -> set[str]:
    """All modules of `ensemble` that importing one brings in."""
    reached, todo = set(), [module]
    while todo:
        each = todo.pop()
        path = ROOT / f"{each.replace('.', '/')}.py"
        if each in reached or not path.exists():
            continue
        reached.add(each)
        todo += [name for name in imports_of(path) if name.startswith("ensemble.")]
    return reached


def test_pure_parts_know_no_torch_and_the_relay_no_tokenizer() -> None:
    for path in (ROOT / "ensemble/scheduling").glob("*.py"):
        assert not {name for name in imports_of(path) if name.split(".")[0] in ("torch", "kernels", "zmq")}
    assert "ensemble.tokenizer" not in reached_from("ensemble.serving.http_relay")


@pytest.mark.parametrize(
    "modules",
    [
        "ensemble.serving.front_door",
        "ensemble.serving.home_model",
        "ensemble.serving.answer_model",
        "ensemble.serving.inputs, ensemble.serving.limits, ensemble.serving.long_texts, ensemble.chat",  # preprocess
        "ensemble.serving.http_relay",
        "ensemble.openai_front.__main__",
        "tools.demo",
        "tools.serve, tools.server.deployment",
    ],
)
def test_only_workers_take_the_seconds_and_the_memory_of_torch(modules: str) -> None:
    told = "import sys; print({'torch', 'triton', 'gguf', 'transformers'} & {*sys.modules})"
    command = [sys.executable, "-c", f"import {modules}; {told}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout == "set()\n"


def test_kernels_know_nothing_of_the_library() -> None:
    assert not {name for path in (ROOT / "kernels").glob("*.py") for name in imports_of(path) if "ensemble" in name}
