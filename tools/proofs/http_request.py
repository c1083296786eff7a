"""One request over HTTP on a connection of its own: what tools that put a server under load send."""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.proofs.grpc_request import Answer, Inputs, ModelName


def ask_http(url: str, inputs: Inputs, timeout_s: float, model: ModelName = "scheduler") -> Answer:
    """Sends the request and waits for its end; after `timeout_s` the client closes the connection."""
    answer = Answer(sent_at=time.monotonic())
    asked = {name: array.tolist() if array.size > 1 else array.item() for name, array in inputs.items()}
    endpoint = "generate_stream" if asked.get("stream") else "generate"
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request("POST", f"/v2/models/{model}/{endpoint}", json.dumps(asked))
        for event in _events(connection, answer.sent_at + timeout_s):
            if "error" in event:
                answer.error = str(event["error"])
            else:
                answer.received_at.append(time.monotonic())
                answer.responses.append({name: _as_array(value) for name, value in event.items()})
        answer.has_ended = True
    except TimeoutError:
        pass
    except (OSError, http.client.HTTPException) as error:
        answer.error, answer.has_ended = f"{type(error).__name__}: {error}", True
    finally:
        answer.ended_at = time.monotonic()
        connection.close()
    return answer


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    """Strings as objects: numpy's own end at their last character that is not NUL."""
    array: np.ndarray[Any, Any] = np.array(value, np.object_ if isinstance(value, str) else None)
    at_least_one: np.ndarray[Any, Any] = np.atleast_1d(array)
    return at_least_one


def _events(connection: http.client.HTTPConnection, deadline: float) -> Iterator[dict[str, Any]]:
    """The JSON of each response. Raises TimeoutError."""
    sock = connection.sock  # the response takes it from the connection
    response = connection.getresponse()
    while line := response.readline():
        if line.strip():
            yield json.loads(line.removeprefix(b"data:"))
        sock.settimeout(max(1e-3, deadline - time.monotonic()))
