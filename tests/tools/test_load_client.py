"""The open-loop client against a server that does what a test needs: what it sends and when, what it makes of it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tools.load.client import drive, prepare
from tools.load.client_process import LoadError, phases


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers each request with responses of 1 and 2 tokens, once as many requests have come as it waits for."""

    def __init__(self, wait_for: int) -> None:
        self.requests: list[Any] = []
        self._wait_for = wait_for
        self._lock = threading.Condition()

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        request = next(request_iterator)
        with self._lock:
            self.requests.append(request)
            self._lock.notify_all()
            has_come = self._lock.wait_for(lambda: len(self.requests) >= self._wait_for, timeout=20)
        if request.model_name == "broken":
            yield service_pb2.ModelStreamInferResponse(error_message="no such model")
            return
        for number in (1, 2) if has_come else ():
            answer = service_pb2.ModelStreamInferResponse()
            answer.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
            answer.infer_response.raw_output_contents.append(b"\2\0\0\0ab")
            answer.infer_response.outputs.add(name="num_output_tokens", datatype="INT32", shape=[1])
            answer.infer_response.raw_output_contents.append(number.to_bytes(4, "little"))
            yield answer
        end = service_pb2.ModelStreamInferResponse()
        end.infer_response.parameters["triton_final_response"].bool_param = True
        yield end


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(servicer: Server) -> str:
        server = grpc.server(ThreadPoolExecutor(64))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def test_all_requests_leave_though_none_is_answered_before_the_last_has_come(serve: Any) -> None:
    """A closed loop of fewer would wait for ever, and every request here gets all its tokens."""
    servicer = Server(wait_for=20)
    ids = np.array([3, 1, 4], np.int32)
    requests = [prepare("scheduler", ids, 3, 0.01 * index, 3) for index in range(20)]
    done: list[int] = []
    outcome = drive(serve(servicer), requests, num_processes=2, keep_text=True, on_done=done.append)
    assert [record.error for record in outcome.records] == [""] * 20
    assert all(record.tokens == [1, 2] and record.text == "abab" for record in outcome.records)
    assert [record.due for record in outcome.records] == pytest.approx([0.01 * index for index in range(20)])
    assert all(record.due <= record.sent <= record.times[0] for record in outcome.records)
    assert outcome.lags and min(outcome.lags) >= 0
    request = servicer.requests[0]
    inputs = dict(zip([each.name for each in request.inputs], request.raw_input_contents, strict=True))
    assert np.frombuffer(inputs["input_ids"], np.int32).tolist() == [3, 1, 4]
    assert int.from_bytes(inputs["max_tokens"], "little") == int.from_bytes(inputs["min_tokens"], "little") == 3
    assert inputs["ignore_eos"] == inputs["stream"] == b"\1"


def test_errors_time_outs_and_warm_ups(serve: Any) -> None:
    url = serve(Server(wait_for=1))
    requests = [prepare("broken", "text", 3, 0.0, 1), prepare("ensemble", "text", 3, 0.0, 1)]
    outcome = drive(url, requests, num_processes=1, num_warmups=0)
    assert sorted(record.error for record in outcome.records) == ["", "no such model"]
    with pytest.raises(LoadError, match=r"the first request to .* failed: no such model"):
        drive(url, requests, num_processes=1, num_warmups=1)
    silent = serve(Server(wait_for=100))
    outcome = drive(silent, requests[1:], num_processes=1, timeout_s=0.2)
    assert outcome.records[0].error == "no end after 0.2 s" and not outcome.records[0].is_complete


def test_a_server_that_is_not_there_is_an_error() -> None:
    request = prepare("ensemble", "Hello", 4, 0.0, 1)
    with pytest.raises(LoadError, match="localhost:1: no server answers"):
        drive("localhost:1", [request], num_processes=1, connect_timeout_s=0.2)


def test_phases_are_what_lies_between_the_servers_times() -> None:
    at = {"arrival": 1, "first_scheduled": 3, "first_token": 7, "decode_submitted": 8, "decode_joined": 10}
    ns = {name: value * 10**9 for name, value in {**at, "last_token": 15}.items()}
    assert phases(ns) == {"queue": 2, "prefill": 4, "bridge": 1, "handoff": 2, "decode": 5}
    assert phases(ns | {"decode_submitted": 0, "decode_joined": 0}) == {"queue": 2, "prefill": 4, "decode": 8}
