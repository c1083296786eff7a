"""Goodput of several modes: a server of each, the same load on it at each rate, and what its clients got.

    python -m tools.bench_goodput --model DIR --devices cuda:0,cuda:1 --dataset-name summary \
        --modes disaggregated,colocated:256,colocated:512 --request-rates 4,8,12,16 --goodput ttft:1000 itl:20

A mode is disaggregated, colocated, or auto (roles by load, with the targets told to the server); `:TOKENS` after it
bounds the prompt tokens beside running sequences; or it is a deployment file, as tools.plan writes them. Each run
leaves its records in --out: what is there is not run again, so that a measurement goes on where it was interrupted, and
other targets need no run at all. Goodput is the highest rate at which 90% of the requests meet all targets, between two
rates by the line that joins them; the curve shows it for other ITL targets.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer import Argument, Option

from ensemble.config import Deployment
from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from ensemble.tokenizer import Tokenizer
from tools.bench_serving import default_processes
from tools.benchmarks.results import write_results
from tools.command_line import run
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.load.client_process import LoadError
from tools.load.goodput import SHARE, Measured, curve_targets
from tools.load.load import MAX_LAG_MS, Load, put
from tools.load.records import METRICS, Run, describe, parse_targets
from tools.load.summary import why_invalid
from tools.load.workloads import DATASETS, Workload
from tools.server.deployment import count_gpus, make_deployment
from tools.server.triton_server import TritonServer
from tools.simulation.against_runs import DEPLOYMENT_FILE

START_S = 15.0  # of a server, for the time that is left
READY_TIMEOUT_S = 600.0
SERVED_TARGETS = ("ttft", "itl", "tpot")  # that a deployment can be told


def main(
    more_goodput: Annotated[list[str] | None, Argument(hidden=True)] = None,
    out: Annotated[Path, Option(help="folder for the records, tables and plots")] = Path("goodput"),
    modes: Annotated[
        str, Option(envvar="MODES", help="MODE, MODE:TOKENS or FILE.yaml, ...")
    ] = "disaggregated,colocated",
    request_rates: Annotated[str, Option(envvar="RATES", help="a second")] = "1,2,4",
    seconds: Annotated[float, Option(envvar="SECONDS_EACH", min=1, help="of arrivals, at each rate")] = 60.0,
    seeds: Annotated[str, Option(help="a run at each rate with each")] = "0",
    goodput: Annotated[list[str] | None, Option(help=f"METRIC:MS ...: {', '.join(METRICS)}")] = None,
    curve: Annotated[str, Option(help="the metric whose target the curve is over")] = "itl",
    model: Annotated[str | None, Option(envvar="MODEL", help="directory or Hub name. Default: make serve's")] = None,
    devices: Annotated[
        str | None,
        Option(envvar="DEVICES", help="disaggregated: the first half prefills. Default: all GPUs, or cpu,cpu"),
    ] = None,
    load_format: Annotated[str | None, Option(help="auto, or dummy for random weights")] = None,
    dtype: str | None = None,
    dataset_name: Annotated[str, Option(envvar="DATASET", help=", ".join(DATASETS))] = "random",
    dataset_path: Annotated[Path | None, Option(envvar="DATASET_PATH", help="of a trace: CSV or JSONL")] = None,
    input_len: Annotated[int, Option(envvar="INPUT_LEN", min=1)] = 512,
    output_len: Annotated[int | None, Option(envvar="OUTPUT_LEN", min=1)] = None,
    range_ratio: Annotated[float, Option(min=0, max=1)] = 0.0,
    scale: Annotated[float, Option(min=0.001, help="of all lengths, for small models")] = 1.0,
    endpoint: Annotated[str, Option(help="ensemble: text; scheduler: token ids of exact lengths")] = "ensemble",
    processes: Annotated[int | None, Option(min=1, help="of the client")] = None,
    max_lag_ms: Annotated[float, Option(min=0, help="of the client, P99; beyond it a run does not count")] = MAX_LAG_MS,
    output: Annotated[Path | None, Option(help="JSON file for the figures, beside the one in --out")] = None,
) -> None:
    targets_ms = parse_targets([*(goodput or []), *(more_goodput or [])]) or {"ttft": 1000.0, "itl": 200.0}
    if curve not in METRICS:
        raise ConfigError(f"--curve {curve}: must be of {', '.join(METRICS)}")
    rates, numbers = numbers_of("--request-rates", request_rates), numbers_of("--seeds", seeds)
    path = resolve_model(model) if model else ensure_default_model()
    common = {"model.path": path, "model.load_format": load_format, "model.dtype": dtype}
    known_ms = {f"scheduler.{metric}_target_ms": ms for metric, ms in targets_ms.items() if metric in SERVED_TARGETS}
    deployments = {
        mode: deployment_of(mode, devices, common | (known_ms if mode.startswith("auto") else {}))
        for mode in modes.split(",")
    }
    load = Load(Workload(dataset_name, dataset_path, input_len, output_len, range_ratio, scale), 1, endpoint=endpoint)
    loads = [
        replace(load, num_prompts=max(1, round(rate * seconds)), rate=rate, seed=int(seed))
        for rate in rates
        for seed in numbers
    ]
    console = Console(stderr=True, highlight=False)
    measured, missing = measure(out, deployments, loads, processes or default_processes(), max_lag_ms, console)
    if measured:
        write(out, output, measured, targets_ms, curve)
    if missing:
        raise LoadError(f"{len(missing)} runs do not count; the same command runs them again: {'; '.join(missing)}")


def numbers_of(flag: str, text: str) -> list[float]:
    """Raises ConfigError."""
    try:
        numbers = sorted({float(each) for each in text.split(",")})
    except ValueError:
        raise ConfigError(f"{flag} {text}: numbers, such as 1,2,4, are needed") from None
    if numbers[0] < 0 or (flag == "--request-rates" and not numbers[0]):
        raise ConfigError(f"{flag} {text}: must be above 0")
    return numbers


def deployment_of(mode: str, devices: str | None, common: dict[str, Any]) -> Deployment:
    """Raises ConfigError."""
    if mode.endswith((".yaml", ".yml")):
        return make_deployment(common, Path(mode))
    name, _, chunk = mode.partition(":")
    if chunk and not chunk.isdecimal():
        raise ConfigError(f"--modes {mode}: a number of tokens is needed after the colon")
    fields: dict[str, Any] = {**common, **fields_of(name), "decode.local_prefill_tokens": int(chunk) if chunk else None}
    if name == "colocated":
        each = devices or ",".join(f"cuda:{index}" for index in range(count_gpus())) or "cpu,cpu"
        fields["decode.devices"] = each.split(",")
    elif devices is not None:
        every = devices.split(",")
        half = max(1, len(every) // 2)
        fields |= {"prefill.devices": every[:half], "decode.devices": every[half:] or every}
    return make_deployment(fields)


def fields_of(mode: str) -> dict[str, Any]:
    """Of the deployment, by which a mode differs."""
    if mode == "auto":
        return {"mode": "disaggregated", "scheduler.roles": "auto"}
    return {"mode": mode} | ({"scheduler.roles": "fixed"} if mode == "disaggregated" else {})


# ---- runs


def measure(
    out: Path,
    deployments: dict[str, Deployment],
    loads: list[Load],
    num_processes: int,
    max_lag_ms: float,
    console: Console,
) -> tuple[list[Measured], list[str]]:
    """The runs of all modes, those on disk included, and which of them do not count. Raises LoadError, ConfigError."""
    found: dict[str, dict[Load, Run]] = {
        mode: {load: run for load in loads if (run := read(file_of(out, mode, load), load)) is not None}
        for mode in deployments
    }
    missing: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        to_do = {mode: [load for load in loads if load not in found[mode]] for mode in deployments}
        total_s = sum(START_S + sum(map(duration_s, each)) for each in to_do.values() if each)
        task = progress.add_task("Starting", total=total_s)
        for mode, left in to_do.items():
            if not left:
                continue
            progress.update(task, description=f"{mode}: starting")
            keep_deployment(out / folder_of(mode) / DEPLOYMENT_FILE, deployments[mode])
            with server_of(deployments[mode], out / f"{folder_of(mode)}.log") as server:
                tokenizer = Tokenizer.from_dir(deployments[mode].model.path)
                max_model_len = load_model_spec(deployments[mode].model.path).max_model_len
                progress.advance(task, START_S)
                for load in left:
                    progress.update(task, description=f"{mode}: {load.rate:g}/s")
                    requests = load.requests(tokenizer, max_model_len)
                    run = put(
                        server.grpc_url,
                        load,
                        requests,
                        num_processes=num_processes,
                        num_warmups=4,
                        max_lag_ms=max_lag_ms,
                    )
                    progress.advance(task, duration_s(load))
                    if run.is_valid:
                        found[mode][load] = run
                        keep(file_of(out, mode, load), run)
                    else:
                        missing.append(f"{mode} at {load.rate:g}/s: {why_invalid(run)}")
    return [Measured(mode, by_rate(runs)) for mode, runs in found.items() if runs], missing


def duration_s(load: Load) -> float:
    return load.num_prompts / load.rate


def by_rate(runs: dict[Load, Run]) -> dict[float, list[Run]]:
    grouped: dict[float, list[Run]] = {}
    for load, each in runs.items():
        grouped.setdefault(load.rate, []).append(each)
    return grouped


@contextlib.contextmanager
def server_of(deployment: Deployment, log: Path) -> Iterator[TritonServer]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with TritonServer(deployment, log_path=log) as server:
        server.wait_ready(timeout_s=READY_TIMEOUT_S)
        yield server


def folder_of(mode: str) -> str:
    return Path(mode).name.replace(":", "-")


def file_of(out: Path, mode: str, load: Load) -> Path:
    return out / folder_of(mode) / f"{load.rate:g}-{load.seed}.json"


def keep_deployment(path: Path, deployment: Deployment) -> None:
    """For tools.simulate. Raises ConfigError if the runs there are of another one."""
    if path.exists() and Deployment.from_yaml(path) != deployment:
        raise ConfigError(f"{path}: is another deployment than the one to be measured; name another folder by --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(deployment.to_yaml(), encoding="utf-8")


def keep(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_bytes(msgspec.json.encode(run))
    whole.rename(path)  # a run is there whole or not at all


def read(path: Path, load: Load) -> Run | None:
    """What is on disk of this run. Raises ConfigError for that of another load."""
    if not path.exists():
        return None
    run = msgspec.json.decode(path.read_bytes(), type=Run)
    if run.load != load.describe():
        differs = [name for name, value in load.describe().items() if run.load.get(name) != value]
        raise ConfigError(f"{path}: is of a run with another {', '.join(differs)}; name another folder by --out")
    return run


# ---- what it comes to


def write(out: Path, output: Path | None, measured: list[Measured], targets_ms: dict[str, float], curve: str) -> None:
    curve_ms = curve_targets(measured, curve)
    console = Console(width=120, highlight=False)
    console.print(attainment_table(measured, targets_ms))
    console.print(curve_table(measured, targets_ms, curve, curve_ms[::4]))
    rows = [row for each in measured for row in rows_of(each, targets_ms, curve, curve_ms[::4])]
    for path in filter(None, (out / "goodput.json", output)):
        write_results(path, rows)
    console.print(f"Figures: {out}/goodput.json", soft_wrap=True)
    try:
        from tools.load.plots import plot_curve, plot_phases
    except ImportError:
        console.print("No plots: matplotlib is not installed (pip install matplotlib, and the same command again)")
        return
    plot_curve(out / "goodput.png", measured, curve, curve_ms, targets_ms)
    plot_phases(out / "phases.png", measured)
    console.print(f"Plots: {out}/goodput.png, phases.png", soft_wrap=True)


def attainment_table(measured: list[Measured], targets_ms: dict[str, float]) -> Table:
    table = Table(title=f"Share of the requests with {describe(targets_ms)}", title_justify="left")
    rates = sorted({rate for each in measured for rate in each.rates})
    for heading in ("mode", *(f"{rate:g}/s" for rate in rates), f"goodput at {SHARE:.0%}"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for each in measured:
        shares = [f"{each.attainment(rate, targets_ms):.3f}" if rate in each.runs else "" for rate in rates]
        table.add_row(each.mode, *shares, f"{each.goodput(targets_ms)}/s")
    return table


def curve_table(measured: list[Measured], targets_ms: dict[str, float], curve: str, curve_ms: list[float]) -> Table:
    table = Table(title=f"Goodput (requests/s) over the {curve.upper()} target", title_justify="left")
    for heading in ("mode", *(f"{ms:g} ms" for ms in curve_ms)):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for each in measured:
        table.add_row(each.mode, *(shown(each, targets_ms | {curve: ms}) for ms in curve_ms))
    return table


def shown(measured: Measured, targets_ms: dict[str, float]) -> str:
    found = measured.goodput(targets_ms)
    return {"at least": ">= ", "less than": "< ", "": ""}[found.bound] + f"{found.rate:.3g}"


def rows_of(
    measured: Measured, targets_ms: dict[str, float], curve: str, curve_ms: list[float]
) -> Iterator[dict[str, Any]]:
    for targets in (targets_ms, *(targets_ms | {curve: ms} for ms in curve_ms)):
        found = measured.goodput(targets)
        name = f"{measured.mode}: goodput at {SHARE:.0%}, {describe(targets)}"
        yield {"name": name, "value": round(found.rate, 3), "unit": f"{found.bound} requests/s".strip()}
    for rate in measured.rates:
        share = round(measured.attainment(rate, targets_ms), 4)
        yield {
            "name": f"{measured.mode}, {rate:g}/s: {describe(targets_ms)}",
            "value": share,
            "unit": "of the requests",
        }
        for phase, seconds in measured.phases(rate).items():
            name = f"{measured.mode}, {rate:g}/s: {phase}, mean"
            yield {"name": name, "value": round(1e3 * seconds, 2), "unit": "ms"}


if __name__ == "__main__":
    run(main)
