"""Serves OpenAI's API over a running Triton server.

python -m ensemble.openai_front --model DIR --name NAME --max-model-len 2048 \
    --grpc-url 127.0.0.1:8001 --ready-url http://127.0.0.1:8000/v2/health/ready --port 9000
"""

import argparse
import asyncio
import os
import socket
import sys
from pathlib import Path

import uvicorn

from ensemble.chat import ChatTemplate
from ensemble.errors import ERROR_MARK, ModelError
from ensemble.interpreter import settle_interpreter
from ensemble.listener import listen, raise_file_limit
from ensemble.openai_front import API_KEY_VARIABLE
from ensemble.openai_front.access import guard
from ensemble.openai_front.app import Front, Limits, make_app
from ensemble.openai_front.bounded_http import BoundedHttp
from ensemble.openai_front.live_page import LivePage
from ensemble.openai_front.prompts import Prompts
from ensemble.openai_front.reading_on import ReadsOn
from ensemble.openai_front.upstream import Upstream
from ensemble.tokenizer import Tokenizer

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close first
SHUTDOWN_S = 2
UNREAD_BODIES = 8  # so many times the longest body is read of one that is refused: else its client would not read why


def main() -> None:
    arguments = parse_arguments()
    raise_file_limit()
    host, port = str(arguments.host), int(arguments.port)
    try:
        listener = listen(host, port, BACKLOG)
    except OSError as error:
        sys.exit(f"{ERROR_MARK} the OpenAI front cannot listen on {host}:{port}: {error.strerror}")
    try:
        asyncio.run(serve(arguments, listener))
    except ModelError as error:
        sys.exit(f"{ERROR_MARK} {error}")


async def serve(arguments: argparse.Namespace, listener: socket.socket) -> None:
    tokenizer = Tokenizer.from_dir(arguments.model)
    limits = Limits(arguments.max_model_len, arguments.max_body_bytes)
    prompts = Prompts(tokenizer, ChatTemplate.from_dir(arguments.model), limits.max_model_len)
    upstream = Upstream(arguments.grpc_url, arguments.ready_url)
    app = make_app(Front(upstream, prompts, tokenizer, arguments.name, limits), upstream)
    if arguments.metrics_url:
        about = (arguments.name, limits.max_model_len)
        LivePage(*about, upstream.is_ready, arguments.metrics_url, arguments.run_dir).add_to(app)
    guard(app, os.environ.get(API_KEY_VARIABLE), arguments.allowed_origin)
    config = uvicorn.Config(
        ReadsOn(app, UNREAD_BODIES * limits.max_body_bytes),
        http=BoundedHttp,
        access_log=False,
        log_level="warning",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
    )
    settle_interpreter()
    await uvicorn.Server(config).serve(sockets=[listener])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ensemble.openai_front", description="OpenAI's API for the server.")
    parser.add_argument("--model", type=Path, required=True, help="directory, for its tokenizer and chat template")
    parser.add_argument("--name", required=True, help="what clients call the model")
    parser.add_argument("--max-model-len", type=int, required=True, help="tokens of prompt and output together")
    parser.add_argument("--grpc-url", required=True, help="host:port of the Triton server")
    parser.add_argument("--ready-url", required=True, help="URL that answers 200 while requests can be served")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, help="of a request")
    parser.add_argument("--metrics-url", help="of the server's metrics; with it there is a page for browsers")
    parser.add_argument("--run-dir", type=Path, default=Path(), help="of the server, for that page")
    parser.add_argument("--allowed-origin", action="append", default=[], help="of pages that may call; *: all")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
