"""A client of a running server, for the terminal.

python -m tools.client "Once upon a time" --max-tokens 64     streams the continuation
python -m tools.client                                        chats, with the model's chat template
python -m tools.client --health                               exit status 1 if a stage has no live worker
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Any

from typer import Argument, Option

from ensemble.errors import DistServeError
from tools.command_line import run

HTTP_URL = "http://127.0.0.1:8000"


class RequestError(DistServeError):
    """The server cannot be reached, or answered with an error."""


def generate_stream(url: str, **inputs: Any) -> Iterator[dict[str, Any]]:
    """Outputs of each response of model `ensemble` over HTTP, as they come. Raises RequestError.

    url: of the HTTP service, such as http://127.0.0.1:8000; inputs: the model's, by name.
    """
    body = json.dumps({"stream": True, **inputs}).encode()
    try:
        with urllib.request.urlopen(f"{url}/v2/models/ensemble/generate_stream", body) as response:
            for line in response:
                if line.startswith(b"data:"):
                    outputs = json.loads(line.removeprefix(b"data:"))
                    if "error" in outputs:  # after the first response the status is sent already
                        raise RequestError(outputs["error"])
                    yield outputs
    except urllib.error.HTTPError as error:
        raise RequestError(_error_text(error.read())) from None
    except (urllib.error.URLError, OSError) as error:
        raise RequestError(f"{url}: {getattr(error, 'reason', error)}") from None


def _error_text(body: bytes) -> str:
    text = body.decode(errors="replace").strip().removeprefix("data:")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError):
        return text


def stages_up(metrics_url: str) -> dict[str, tuple[int, int]]:
    """Stage |-> (replicas that serve, replicas), from the server's metrics. Raises RequestError."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=10) as page:
            lines = page.read().decode().splitlines()
    except OSError as error:
        raise RequestError(f"{metrics_url}: {getattr(error, 'reason', error)}") from None
    up: dict[str, tuple[int, int]] = {"prefill": (0, 0), "decode": (0, 0)}
    for line in lines:
        found = re.match(r'distserve:replica_up\{.*stage="(\w+)".*\} (\S+)', line)
        if found:
            serving, known = up[found.group(1)]
            up[found.group(1)] = serving + int(float(found.group(2))), known + 1
    return up


def show_health(metrics_url: str) -> bool:
    """Prints a line for each stage. True if each has a replica that serves."""
    up = stages_up(metrics_url)
    for stage, (serving, known) in up.items():
        print(f"{stage:8} {serving} of {known} replicas up")
    return all(serving > 0 for serving, _ in up.values())


def chat(url: str, **sampling: Any) -> None:
    """A conversation in the terminal, until end of input. An error ends the turn, not the conversation."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            continue
        turn = [*messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for outputs in generate_stream(url, messages=json.dumps(turn), **sampling):
                answer += outputs["text_output"]
                print(outputs["text_output"], end="", flush=True)
        except RequestError as error:
            print(f"error: {error}")
            continue
        print()
        messages = [*turn, {"role": "assistant", "content": answer}]


Url = Annotated[str, Option(help="of the HTTP service")]
MaxTokens = Annotated[int, Option(min=1)]
Temperature = Annotated[float, Option(min=0, help="0 is greedy")]


def talk(url: Url = HTTP_URL, max_tokens: MaxTokens = 256, temperature: Temperature = 0.0) -> None:
    """A conversation with the model of a running server, until end of input."""
    chat(url, max_tokens=max_tokens, temperature=temperature)


def main(
    prompt: Annotated[
        str | None, Argument(help="continued as it is; without one: a chat, by the model's template")
    ] = None,
    url: Url = HTTP_URL,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    health: Annotated[
        bool, Option("--health", help="say which replicas serve; exit status 1 if a stage has none")
    ] = False,
    metrics_url: Annotated[str, Option(help="of the metrics service")] = "http://127.0.0.1:8002/metrics",
) -> None:
    """Streams the continuation of a prompt to the terminal, or chats."""
    if health:
        raise SystemExit(0 if show_health(metrics_url) else 1)
    if prompt is None:
        chat(url, max_tokens=max_tokens, temperature=temperature)
        return
    for outputs in generate_stream(url, text_input=prompt, max_tokens=max_tokens, temperature=temperature):
        print(outputs["text_output"], end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
