"""Starts the server, streams one answer to the terminal, says where the time went, stops the server.

python -m tools.demo --prompt "The capital of France is" --max-tokens 32
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from tools.client import RequestError, generate_stream
from tools.command_line import run
from tools.installation.cache import cache_dir
from tools.serve import start
from tools.server.deployment import make_deployment
from tools.server.triton_server import TritonServer

PROMPT = "The planets of the solar system, in order from the Sun, are"


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. Times are those of time.time_ns(), which the server on this host reads too."""

    sent_ns: int
    first_response_ns: int
    last_response_ns: int
    num_output_tokens: int
    last_outputs: dict[str, Any]  # the outputs of the last response, with the server's timeline


def main(
    prompt: Annotated[str, Option(envvar="PROMPT", help="continued as it is, without a chat template")] = PROMPT,
    max_tokens: Annotated[int, Option(envvar="MAX_TOKENS", min=1)] = 64,
    temperature: Annotated[float, Option(envvar="TEMPERATURE", min=0, help="0 is greedy")] = 0.0,
    model: Annotated[Path | None, Option(envvar="MODEL", help="directory or Hub name; none: SmolLM2-135M")] = None,
    mode: Annotated[str | None, Option(envvar="MODE", help="disaggregated or colocated")] = None,
) -> None:
    """Streams one answer from a server of its own, and says where the time went."""
    console = Console(highlight=False)
    deployment = make_deployment({"model.path": model, "mode": mode})
    with TritonServer(deployment, log_path=cache_dir() / "server-demo.log") as server:
        started = time.monotonic()
        start(server, console)
        console.print(f"Ready after {time.monotonic() - started:.1f} s at {server.http_url}\n")
        print(prompt, end="", flush=True)
        try:
            answer = stream_answer(server.http_url, text_input=prompt, max_tokens=max_tokens, temperature=temperature)
        finally:
            print("\n")  # an error has a line of its own
        for line in report(answer):
            console.print(line, markup=False)
    console.print("\nServer stopped")


def stream_answer(url: str, **inputs: Any) -> Answer:
    """Prints an answer as it comes. Raises RequestError, also if the answer ends early."""
    options = ("return_num_input_tokens", "return_num_output_tokens", "return_finish_reason", "return_perf_metrics")
    response_times_ns, num_output_tokens, outputs = [], 0, {}
    sent_ns = time.time_ns()
    for outputs in generate_stream(url, **inputs, **dict.fromkeys(options, True)):
        response_times_ns.append(time.time_ns())
        print(outputs["text_output"], end="", flush=True)
        num_output_tokens += outputs["num_output_tokens"]
    if outputs.get("finish_reason") not in ("stop", "length"):
        raise RequestError("the answer ended before it was complete")
    return Answer(sent_ns, response_times_ns[0], response_times_ns[-1], num_output_tokens, outputs)


def report(answer: Answer) -> Iterator[str]:
    """Lines that say how fast the answer came, and how its time divides."""
    outputs = answer.last_outputs
    num_tokens = answer.num_output_tokens
    yield f"Tokens    {outputs['num_input_tokens']} in, {num_tokens} out (finish reason: {outputs['finish_reason']})"
    yield f"TTFT      {_ms(answer.sent_ns, answer.first_response_ns)}   time to first token"
    if answer.last_response_ns > answer.first_response_ns:
        mean_ns = (answer.last_response_ns - answer.first_response_ns) / (num_tokens - 1)
        yield f"TPOT      {mean_ns / 1e6:8.1f} ms   time per output token after the first: {1e9 / mean_ns:.0f} tokens/s"
    yield ""
    yield "Where the time went"
    times = {name.removesuffix("_time_ns"): value for name, value in outputs.items() if name.endswith("_time_ns")}
    yield f"  front   {_ms(answer.sent_ns, times['arrival'])}   HTTP and tokenizer"
    yield f"  queue   {_ms(times['arrival'], times['first_scheduled'])}   until a prefill worker took it"
    yield f"  prefill {_ms(times['first_scheduled'], times['first_token'])}   the prompt, and the first token"
    if times["decode_submitted"]:  # 0 without a hand-off: one token, or colocated
        size = f"{outputs['kv_transfer_bytes'] / 2**20:.1f} MiB of KV in {times['kv_transfer'] / 1e6:.1f} ms"
        yield f"  bridge  {_ms(times['first_token'], times['decode_submitted'])}   until a decode worker had room"
        yield f"  handoff {_ms(times['decode_submitted'], times['decode_joined'])}   {size}"
    if num_tokens > 1:
        decode_start = times["decode_joined"] or times["first_token"]
        yield f"  decode  {_ms(decode_start, times['last_token'])}   the other {num_tokens - 1} tokens"
    yield f"  back    {_ms(times['last_token'], answer.last_response_ns)}   the last token's way to the client"
    yield f"  total   {_ms(answer.sent_ns, answer.last_response_ns)}"


def _ms(start_ns: int, end_ns: int) -> str:
    return f"{(end_ns - start_ns) / 1e6:8.1f} ms"


if __name__ == "__main__":
    run(main)
