"""A model by name: from a Hub at the address that HF_ENDPOINT names, from the cache without one, or one line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ensemble.config import ModelConfig
from tests.checkpoints import make_tiny_opt
from tools.installation.model_source import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "facebook/opt-tiny"


class Hub(ThreadingHTTPServer):
    """One repository, by the Hub's HTTP interface as huggingface_hub uses it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.directory = directory
        self.downloaded: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(path.name for path in self.server.directory.iterdir())
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": file} for file in files]
            self.send(200, {}, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [{"type": "file", "path": file, **self.identity(file)} for file in files]
            self.send(200, {}, json.dumps(entries).encode())
        elif path.startswith(f"/{NAME}/resolve/") and path.split("/")[-1] in files:
            file = path.split("/")[-1]
            etag = {"ETag": f'"{self.identity(file)["oid"]}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.server.downloaded.add(file)
            self.send(200, etag, (self.server.directory / file).read_bytes(), with_body)
        elif path.startswith("/api/models/gated/"):
            self.send(403, {"X-Error-Code": "GatedRepo"}, b"")
        else:
            self.send(404, {"X-Error-Code": "RepoNotFound"}, b"")

    def identity(self, file: str) -> dict[str, object]:
        content = (self.server.directory / file).read_bytes()
        return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = make_tiny_opt(tmp_path / "published")
    (directory / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (directory / "flax_model.msgpack").write_bytes(b"and again")
    with Hub(directory) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def resolve(name: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`resolve_model` as a program, since huggingface_hub reads its variables when it is imported."""
    program = """
import sys
from ensemble.errors import ModelError
from tools.installation.model_source import resolve_model
try:
    print(resolve_model(sys.argv[1]))
except ModelError as error:
    sys.exit(f"error: {error}")
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(home), **variables}
    return subprocess.run([sys.executable, "-c", program, name], env=env, capture_output=True, text=True, timeout=60)


def make_cached(home: Path) -> Path:
    """A tiny OPT where an earlier download would have left it."""
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return make_tiny_opt(repository / "snapshots" / COMMIT)


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME) == Path(NAME)
    assert resolve_model(tmp_path / NAME) == tmp_path / NAME


@pytest.mark.parametrize("path", ["/no/such/model", "./no/model", "model", "a/b/c"])
def test_what_is_no_name_of_the_hub_is_left_to_the_reader(path: str) -> None:
    assert resolve_model(path) == Path(path)


def test_a_model_is_downloaded_once_and_then_found_without_a_network(tmp_path: Path, hub: Hub) -> None:
    result = resolve(NAME, tmp_path / "home", HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.strip())
    assert ModelConfig(path=path).name == NAME
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {file.name for file in path.iterdir()} == hub.downloaded == expected
    assert (path / "model.safetensors").read_bytes() == (hub.directory / "model.safetensors").read_bytes()
    assert "100%" in result.stderr, "no progress was shown"

    hub.downloaded.clear()
    again = resolve(NAME, tmp_path / "home", HF_ENDPOINT=hub.url)
    offline = resolve(NAME, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.stdout == offline.stdout == result.stdout
    assert not hub.downloaded


def test_bin_files_are_downloaded_where_there_are_no_safetensors(tmp_path: Path, hub: Hub) -> None:
    (hub.directory / "model.safetensors").unlink()
    assert resolve(NAME, tmp_path / "home", HF_ENDPOINT=hub.url).returncode == 0
    assert "pytorch_model.bin" in hub.downloaded
    assert "flax_model.msgpack" not in hub.downloaded


def test_a_repository_of_another_format_is_named_before_anything_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    (hub.directory / "model.safetensors").rename(hub.directory / "model-q4_0.gguf")
    (hub.directory / "pytorch_model.bin").unlink()
    result = resolve(NAME, tmp_path / "home", HF_ENDPOINT=hub.url)
    assert result.stderr.startswith(f"error: model {NAME}: on the Hub it holds a GGUF model")
    assert result.stderr.count("\n") == 1 and not hub.downloaded


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_the_cache_is_used(tmp_path: Path, variables: dict[str, str]) -> None:
    path = make_cached(tmp_path)
    result = resolve(NAME, tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == path


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_model_that_cannot_be_had_is_one_line_that_says_how(tmp_path: Path, variables: dict[str, str]) -> None:
    result = resolve(NAME, tmp_path, **variables)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: model {NAME}: no such directory, not in the Hugging Face cache")
    assert f"hf download {NAME} --local-dir DIR" in result.stderr


@pytest.mark.parametrize(("name", "advice"), [("no/such", "not on the Hub"), ("gated/model", "accept it on")])
def test_the_hubs_refusals_say_what_to_do(tmp_path: Path, hub: Hub, name: str, advice: str) -> None:
    result = resolve(name, tmp_path / "home", HF_ENDPOINT=hub.url)
    assert result.stderr.startswith(f"error: model {name}: ") and result.stderr.count("\n") == 1
    assert advice in result.stderr


def test_a_download_that_fails_is_one_line(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file").write_text("where the cache should be")
    result = resolve(NAME, tmp_path, HF_HUB_CACHE=str(tmp_path / "file"), HF_ENDPOINT=hub.url)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: model {NAME}: the download failed: ")


def test_offline_generation_takes_a_name(tmp_path: Path) -> None:
    make_cached(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\n")
    command = [sys.executable, "-m", "tools.offline", "--model", NAME, "--kv-cache-bytes", "1000000"]
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*command, "--max-tokens", "4", prompts], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 1 <= len(json.loads(result.stdout)["output_ids"]) <= 4
