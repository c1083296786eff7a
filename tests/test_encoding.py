"""Text is UTF-8 whatever the locale: the server's stubs run an interpreter that knows no other than ASCII."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = [file for folder in ("ensemble", "tools", "model_repository") for file in (ROOT / folder).rglob("*.py")]

READ = """
import json, locale, sys
from pathlib import Path
from ensemble.chat import ChatTemplate
from ensemble.config import Deployment
from ensemble.errors import ModelError
from ensemble.models.spec import load_model_spec
from ensemble.tokenizer import Tokenizer
path = Path(sys.argv[1])
tokenizer = Tokenizer.from_dir(path)
prompt = ChatTemplate.from_dir(path).render(json.dumps([{"role": "user", "content": "Gr\\xf6\\xdfe"}]))
assert Deployment.from_yaml(path / "deployment.yaml").model.path == path
try:
    load_model_spec(path / "absent")
except ModelError as error:
    assert "gr\\xf6\\xdfe/absent: " in str(error), str(error)
answer = tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=False))
print(json.dumps([locale.getpreferredencoding(False), prompt, answer]))
"""


def text_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, bool]]:
    """Calls that open a file as text, and whether they name the encoding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and opens_text(node):
            yield node, any(keyword.arg == "encoding" for keyword in node.keywords)


def opens_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not has_binary_mode(call.args[1:])
    if not isinstance(call.func, ast.Attribute):
        return False
    is_of_path = call.func.attr == "open" and all(isinstance(arg, ast.Constant) for arg in call.args)
    return call.func.attr in ("read_text", "write_text") or (is_of_path and not has_binary_mode(call.args))


def has_binary_mode(arguments: list[ast.expr]) -> bool:
    return any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in arguments)


def test_every_file_of_text_is_opened_with_its_encoding() -> None:
    found = [
        (file, call.lineno, named)
        for file in SOURCES
        for call, named in text_calls(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert len(found) > 20
    assert [f"{file.relative_to(ROOT)}:{line}" for file, line, named in found if not named] == []


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_not_ascii_are_read_under_the_c_locale(tmp_path: Path, file: str) -> None:
    path = tmp_path / "größe"
    make_tiny_tokenizer(path)
    template = "你好 {{ messages[0].content }}"
    config = {
        "eos_token": "</s>",
        "pad_token": "<填充>",
        "additional_special_tokens": ["<工具>"],
        "added_tokens_decoder": {},
    }
    if file == "chat_template.jinja":
        (path / file).write_text(template, encoding="utf-8")
    else:
        config |= {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    stage = {"devices": ["cpu"]}
    deployment = {"model": {"path": str(path)}, "prefill": stage, "decode": stage}
    (path / "deployment.yaml").write_text(f"# größer\n{json.dumps(deployment)}", encoding="utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", READ, str(path)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    encoding, prompt, answer = json.loads(result.stdout)
    assert encoding != "utf-8"
    assert prompt == answer == "你好 Größe"
