"""A client of a running server: streams the continuation of one prompt.

python -m tools.client "Once upon a time" --max-tokens 64
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Any

from typer import Argument, Option

from ensemble.errors import DistServeError
from tools.command_line import run


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


def main(
    prompt: Annotated[str, Argument(help="continued as it is, without a chat template")],
    url: Annotated[str, Option(help="of the HTTP service")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, Option()] = 64,
    temperature: Annotated[float, Option(help="0 is greedy")] = 0.0,
) -> None:
    """Streams the continuation of a prompt to the terminal."""
    for outputs in generate_stream(url, text_input=prompt, max_tokens=max_tokens, temperature=temperature):
        print(outputs["text_output"], end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
