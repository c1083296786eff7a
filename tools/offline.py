"""Generates for a file of prompts with the engine in this process, without a server.

python -m tools.offline --model DIR prompts.txt                    # one prompt a line
python -m tools.offline --model DIR --output out.jsonl prompts.txt
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ensemble.cache.block_manager import Owner
from ensemble.config import Deployment
from ensemble.engine.batch import Batch, PrefillRow
from ensemble.engine.engine import Engine, load_engine
from ensemble.errors import ConfigError, DistServeError, InvalidRequest
from ensemble.request import Request, SamplingParams, Sequence
from ensemble.serving.answer_text import answer_text
from ensemble.tokenizer import Tokenizer
from tools.installation.cache import ensure_home
from tools.installation.model_source import resolve_model


def generate(
    engine: Engine,
    requests: Iterable[Request],
    *,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    on_token: Callable[[Sequence], None] = lambda sequence: None,
) -> dict[int, Sequence]:
    """Runs all requests to their end: each step, every running sequence decodes and waiting prompts fill the budget.

    Blocks are reserved for a sequence's whole life, so nothing is preempted. Returns request_id |-> sequence.
    """
    waiting = deque(requests)
    prompts: deque[Sequence] = deque()  # have blocks, and prompt tokens left to compute
    running: dict[int, Sequence] = {}  # by request_id
    done: dict[int, Sequence] = {}
    while waiting or prompts or running:
        while waiting and len(prompts) + len(running) < max_num_seqs:
            num_blocks = engine.blocks.blocks_for(waiting[0].max_num_kv_tokens)
            if num_blocks > engine.blocks.num_free_blocks:
                if not prompts and not running:
                    limit = engine.pool.num_blocks * engine.pool.layout.block_size
                    raise InvalidRequest("prompt + max_tokens", waiting[0].max_num_tokens, f"the pool holds {limit}")
                break
            sequence = Sequence(waiting.popleft())
            sequence.block_ids = engine.blocks.allocate(Owner("sequence", sequence.request_id), num_blocks)
            prompts.append(sequence)
        decodes = list(running.values())
        rows, budget = [], max_num_batched_tokens
        while prompts and budget > 0:
            sequence = prompts[0]
            length = min(budget, sequence.prompt_len - sequence.num_computed_tokens)
            rows.append(PrefillRow(sequence, sequence.num_computed_tokens, length))
            budget -= length
            if sequence.num_computed_tokens + length < sequence.prompt_len:
                break  # its next chunk goes into the next step
            prompts.popleft()
        for sequence in engine.step(Batch(rows, decodes)):
            if sequence.is_finished:
                running.pop(sequence.request_id, None)
                engine.blocks.free(Owner("sequence", sequence.request_id))
                done[sequence.request_id] = sequence
            else:
                running[sequence.request_id] = sequence
            on_token(sequence)
    return done


def main(
    prompts_file: Annotated[
        typer.FileText, typer.Argument(encoding="utf-8", help="one prompt a line; - is standard input")
    ],
    model: Annotated[Path, typer.Option(help="Hugging Face directory, or name such as facebook/opt-1.3b")],
    output: Annotated[Path | None, typer.Option(help="JSON lines; default: standard output")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    ignore_eos: bool = False,
    device: str = "cuda:0" if torch.cuda.is_available() else "cpu",
    dtype: str = "auto",
    load_format: str = "auto",
    block_size: int = 16,
    kv_cache_bytes: int | None = None,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
) -> None:
    """Generates a continuation of each prompt."""
    try:
        ensure_home()
        model = resolve_model(model)
        stage = {"devices": [device], "kv_cache_bytes": kv_cache_bytes}
        deployment = Deployment.parse(
            {
                "model": {"path": model, "dtype": dtype, "load_format": load_format},
                "prefill": stage,
                "decode": stage,
                "block_size": block_size,
            }
        )
        engine = load_engine(deployment, deployment.decode, torch.device(device))
        tokenizer = Tokenizer.from_dir(model)
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, ignore_eos=ignore_eos
        )
        prompts = [line.rstrip("\n") for line in prompts_file if line.strip()]
        requests = [
            Request(request_id=index, prompt_token_ids=tokenizer.encode(prompt), sampling=sampling)
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            if request.max_num_tokens > engine.spec.max_model_len:
                raise InvalidRequest(
                    "prompt + max_tokens", request.max_num_tokens, f"at most {engine.spec.max_model_len} tokens"
                )
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts, {task.fields[tokens]} tokens"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(requests), tokens=0)

            def show(sequence: Sequence) -> None:
                tokens = progress.tasks[task].fields["tokens"] + 1
                progress.update(task, advance=int(sequence.is_finished), tokens=tokens)

            done = generate(
                engine,
                requests,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                on_token=show,
            )
    except DistServeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    lines = "".join(
        json.dumps(
            {
                "prompt": prompt,
                "text": answer_text(tokenizer, done[index]),
                "output_ids": done[index].output_token_ids,
                "finish_reason": done[index].finish_reason,
            },
            ensure_ascii=False,
        )
        + "\n"
        for index, prompt in enumerate(prompts)
    )
    if output is None:
        print(lines, end="")
    else:
        output.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
