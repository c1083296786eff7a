"""What the documents name exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from ensemble.openai_front.protocol import WITHOUT_EFFECT, ChatRequest, CompletionRequest
from ensemble.serving.metric_families import FAMILIES

ROOT = Path(__file__).parent.parent
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "docs/architecture.md")}
PAGES = DOCUMENTS | {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def table_paths(text: str) -> list[str]:
    tables = re.findall(r"^\| (?:path|folder) \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return re.findall(r"^\| `([^`]+)` \|", "".join(tables), re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_the_tables_exists(document: str) -> None:
    paths = table_paths(DOCUMENTS[document])
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_to_files(document: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", PAGES[document]) if "://" not in target]
    files = [target.partition("#")[0] or Path(document).name for target in targets]
    assert [file for file in files if not ((ROOT / document).parent / file).exists()] == []


@pytest.mark.parametrize("document", PAGES)
def test_commands_exist(document: str) -> None:
    text = PAGES[document]
    modules = set(re.findall(r"python -m (tools(?:\.\w+)+)", text))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (demo|serve|test|check|clean|help)\b", text)) <= targets


def test_every_model_of_the_repository_is_in_the_table() -> None:
    named = set(table_paths(DOCUMENTS["docs/architecture.md"]))
    models = {f"model_repository/{path.parent.name}" for path in (ROOT / "model_repository").glob("*/config.pbtxt")}
    assert models <= named


def test_the_api_page_names_every_input_and_output() -> None:
    page = (ROOT / "docs/api.md").read_text()
    tables = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    documented = set(re.findall(r"`(\w+)`", tables))
    config = (ROOT / "model_repository/scheduler/config.pbtxt").read_text()
    declared = set(re.findall(r'\{ name: "(\w+)"', config))
    assert documented == declared


def test_the_page_of_openais_api_names_every_member() -> None:
    page = (ROOT / "docs/openai.md").read_text()
    tables = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    documented = set(re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", tables))
    known = {name for each in (ChatRequest, CompletionRequest) for name in (*each.model_fields, *each.unserved)}
    assert documented == known | WITHOUT_EFFECT


def test_the_api_page_names_every_metric() -> None:
    page = (ROOT / "docs/api.md").read_text()
    assert set(re.findall(r"`((?:vllm|distserve):\w+)`", page)) == set(FAMILIES)
