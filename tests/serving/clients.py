"""Clients of the real server, as a user would write them with tritonclient."""

import queue
import re
import threading
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

DTYPES = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "stop_words": "BYTES",
    "input_ids": "INT32",
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "top_k": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "seed": "UINT64",
    "n": "INT32",
    "priority": "INT32",
    "tenant": "BYTES",
    "ttft_target_ms": "FP32",
    "itl_target_ms": "FP32",
    "tpot_target_ms": "FP32",
    "timeout_ms": "FP32",
}
NUMPY = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


@dataclass
class Answer:
    """One request's responses, in the order in which they came."""

    responses: list[dict[str, np.ndarray]] = field(default_factory=list)
    error: InferenceServerException | None = None
    ends_with_outputs: bool = False  # the final response is not an empty one

    @property
    def text(self) -> str:
        return b"".join(each["text_output"].reshape(-1)[0] for each in self.responses).decode()

    @property
    def output_ids(self) -> list[int]:
        return [int(i) for each in self.responses for i in each["output_ids"]]

    @property
    def finish_reason(self) -> str:
        return self.responses[-1]["finish_reason"].reshape(-1)[0].decode()


def make_inputs(batched: bool = False, **values: Any) -> list[grpc.InferInput]:
    """Tensors by name; `batched` adds the leading dimension that the ensemble wants."""
    inputs = []
    for name, value in values.items():
        dtype = DTYPES.get(name, "BOOL")
        array = np.atleast_1d(np.array(value, dtype=NUMPY[dtype]))
        array = array[np.newaxis] if batched else array
        tensor = grpc.InferInput(name, list(array.shape), dtype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


class StreamClient:
    """Many requests on one gRPC stream; `wait` returns when all have ended."""

    def __init__(self, url: str) -> None:
        self._client = grpc.InferenceServerClient(url)
        self.answers: dict[str, Answer] = {}
        self._open = 0
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._client.start_stream(self._receive)

    def send(self, model: str, request_id: str, **values: Any) -> None:
        self.send_inputs(model, request_id, make_inputs(batched=model == "ensemble", **values))

    def send_inputs(self, model: str, request_id: str, inputs: list[grpc.InferInput], **settings: Any) -> None:
        self.answers[request_id] = Answer()
        self._open += 1
        self._client.async_stream_infer(
            model, inputs, request_id=request_id, enable_empty_final_response=True, **settings
        )

    def wait(self, timeout_s: float = 120.0) -> dict[str, Answer]:
        for _ in range(self._open):
            self._done.get(timeout=timeout_s)
        self._open = 0
        return self.answers

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()

    def _receive(self, result: Any, error: InferenceServerException | None) -> None:
        if error is not None:
            match = re.search(r"\[request id: ([^\]]+)\]", str(error))
            request_id = match.group(1) if match else next(iter(self.answers), None)
            if request_id is not None:  # else the stream ended before the first request
                self.answers[request_id].error = error
            self._done.put(None)
            return
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        if response.outputs or not is_final:
            outputs = {output.name: result.as_numpy(output.name) for output in response.outputs}
            self.answers[response.id].responses.append(outputs)
        if is_final:
            self.answers[response.id].ends_with_outputs = bool(response.outputs)
            self._done.put(None)


def generate(url: str, model: str = "scheduler", **values: Any) -> Answer:
    """One request on a stream of its own. Raises InferenceServerException."""
    client = StreamClient(url)
    try:
        client.send(model, "only", **values)
        answer = client.wait()["only"]
    finally:
        client.close()
    if answer.error is not None:
        raise answer.error
    return answer


def run_streams(url: str, requests: list[dict[str, Any]], num_clients: int, model: str = "scheduler") -> list[Answer]:
    """Each client thread has one gRPC stream and sends its next request when the last has ended."""
    answers: list[Answer | None] = [None] * len(requests)
    todo = queue.SimpleQueue[int]()
    for index in range(len(requests)):
        todo.put(index)

    def work() -> None:
        client = StreamClient(url)
        while True:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                break
            client.send(model, str(index), **requests[index])
            answers[index] = client.wait()[str(index)]
        client.close()

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=280)
    assert all(answer is not None for answer in answers), "a client has not finished"
    return answers  # type: ignore[return-value]


def read_metrics(url: str) -> dict[str, float]:
    """The metrics page: full sample name |-> value."""
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}


def total(metrics: dict[str, float], name: str, label: str = "") -> float:
    """Sum of the samples of a metric, over all labels or those that hold `label`."""
    return sum(value for sample, value in metrics.items() if sample.startswith(name + "{") and label in sample)


def blocks_in_use(metrics: dict[str, float]) -> float:
    """Blocks that are not free, of all replicas, by the workers' own count."""
    total = sum(value for name, value in metrics.items() if name.startswith("distserve:kv_blocks{"))
    free = sum(value for name, value in metrics.items() if name.startswith("distserve:kv_blocks_free{"))
    return total - free
