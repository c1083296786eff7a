"""What the flags of `tools.serve` about its fronts come to; what that does is tested with the fronts themselves."""

from pathlib import Path
from typing import Any

import pytest
import typer

from tests.checkpoints import make_tiny_llama
from tools import serve
from tools.server.ports import Ports

DEFAULTS = {"openai_port": 9000, "page": True, "api_key": None, "allowed_origins": [], "host": "127.0.0.1"}


class Asked(Exception):
    """For a server."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, dict[str, Any]]:
    """The deployment, and how it is to be served."""

    def make(deployment: Any, **settings: Any) -> None:
        raise Asked(deployment, settings)

    monkeypatch.setattr(serve, "TritonServer", make)
    app = typer.Typer()
    app.command()(serve.main)
    with pytest.raises(Asked) as caught:
        typer.main.get_command(app).main(list(arguments), standalone_mode=False)
    deployment, settings = caught.value.args
    return deployment, settings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--no-page"], {"page": False}),
        (["--no-openai"], {"openai_port": None}),
        (["--openai-port", "9001"], {"openai_port": 9001}),
        (["--host", "0.0.0.0"], {"host": "0.0.0.0"}),
        (["--http-port", "1", "--grpc-port", "2", "--metrics-port", "3"], {"ports": Ports(1, 2, 3)}),
        (["--no-http-relay"], {"http_relay": False}),
        (["--max-body-bytes", "100"], {"max_body_bytes": 100}),
        (["--allow-client-shm"], {"allow_client_shm": True}),
        (["--api-key", "secret"], {"api_key": "secret"}),
        (["--allowed-origins", "https://a.org,https://b.org"], {"allowed_origins": ["https://a.org", "https://b.org"]}),
    ],
)
def test_of_the_fronts(
    model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: dict[str, Any]
) -> None:
    _, settings = asked_for(monkeypatch, str(model), *arguments)
    assert {**DEFAULTS, "ports": Ports(8000, 8001, 8002), **expected}.items() <= settings.items()


@pytest.mark.parametrize(
    ("variable", "value", "name"), [("DISTSERVE_API_KEY", "secret", "api_key"), ("HOST", "::1", "host")]
)
def test_of_variables(model: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str) -> None:
    monkeypatch.setenv(variable, value)
    assert asked_for(monkeypatch, str(model))[1][name] == value
    monkeypatch.setenv(variable, "")
    assert asked_for(monkeypatch, str(model))[1][name] == DEFAULTS[name], "as compose files have what is not set"


def test_of_the_deployment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, _ = asked_for(monkeypatch, str(model))
    assert (deployment.model.name, deployment.otlp_endpoint) == (model.name, None)
    flags = ["--served-model-name", "gpt-4o", "--otlp-endpoint", "http://localhost:4318"]
    deployment, _ = asked_for(monkeypatch, str(model), *flags)
    assert (deployment.model.name, deployment.otlp_endpoint) == ("gpt-4o", "http://localhost:4318")
