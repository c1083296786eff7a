"""Plans a deployment: degrees, numbers and roles of replicas for a model, a cluster, a workload and targets.

    python -m tools.plan --model DIR --gpu h100 --nodes 1 --gpus-per-node 8 --dataset-name chat \
        --goodput ttft:250 itl:40 --request-rate 20 --out planned.yaml
    make serve DEPLOYMENT=planned.yaml

DistServe's placement search (tools/planning) for high and low node affinity, with transfers, prefix hits and
swapping in what it simulates; colocated replicas at several chunks are tried too. The best few are judged by the real
router and engine loops in virtual time. Steps are predicted from rates of the GPU, or fitted to --costs of
tools.simulate, and so are as good as these.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer import Argument, Option

from ensemble.errors import ConfigError
from ensemble.models.spec import load_model_spec
from tools.command_line import run
from tools.installation.default_model import ensure_default_model
from tools.installation.model_source import resolve_model
from tools.load.records import describe, parse_targets
from tools.load.workloads import DATASETS, Workload
from tools.planning.plan import Choice, Plan
from tools.planning.search import Cluster
from tools.simulation.costs import GPUS, read_costs
from tools.simulation.noise import SENDERS

KNOWN_TARGETS = ("ttft", "tpot", "itl", "gap")


def main(
    more_goodput: Annotated[list[str] | None, Argument(hidden=True)] = None,
    model: Annotated[str | None, Option(envvar="MODEL", help="directory or Hub name; config.json is enough")] = None,
    gpu: Annotated[str, Option(help=", ".join(GPUS))] = "h100",
    nodes: Annotated[int, Option(min=1)] = 1,
    gpus_per_node: Annotated[int, Option(min=1)] = 8,
    gpu_memory: Annotated[float | None, Option(min=1, help="GiB of a GPU, where it is not that of its kind")] = None,
    link_rate: Annotated[float | None, Option(min=0.1, help="GB/s between two GPUs of a node")] = None,
    network_rate: Annotated[float, Option(min=0.01, help="GB/s between nodes, for each GPU")] = 25.0,
    affinity: Annotated[str, Option(help="high, low or both")] = "both",
    costs: Annotated[Path | None, Option(help="JSON file of tools.simulate --measure, of one such GPU")] = None,
    request_rate: Annotated[float | None, Option(min=0.001, help="a second; none: as many as the cluster can")] = None,
    goodput: Annotated[list[str] | None, Option(help=f"METRIC:MS ...: {', '.join(KNOWN_TARGETS)}")] = None,
    dataset_name: Annotated[str, Option(help=", ".join(DATASETS))] = "chat",
    dataset_path: Annotated[Path | None, Option(help="of a trace: CSV or JSONL")] = None,
    input_len: Annotated[int, Option(min=1)] = 512,
    output_len: Annotated[int | None, Option(min=1)] = None,
    range_ratio: Annotated[float, Option(min=0, max=1)] = 0.0,
    prefix_hit_share: Annotated[float, Option(min=0, max=0.95, help="of a prompt, found in prefix caches")] = 0.0,
    endpoint: Annotated[str, Option(help=f"that clients ask: {', '.join(SENDERS)}")] = "ensemble",
    swap_space: Annotated[float, Option(min=0, help="GiB of host memory of each decode replica")] = 0.0,
    out: Annotated[Path, Option(help="the deployment file")] = Path("planned.yaml"),
    jobs: Annotated[int | None, Option(min=1, help="trials at a time; default: the cores")] = None,
    alternatives: Annotated[int, Option(min=0, help="runners-up that get files beside it")] = 0,
) -> None:
    targets_ms = parse_targets([*(goodput or []), *(more_goodput or [])]) or {"ttft": 1000.0, "itl": 100.0}
    for metric in targets_ms:
        if metric not in KNOWN_TARGETS:
            raise ConfigError(f"--goodput {metric}: a plan knows {', '.join(KNOWN_TARGETS)}")
    if gpu not in GPUS or affinity not in ("high", "low", "both"):
        raise ConfigError(f"--gpu {gpu}, --affinity {affinity}: must be of {', '.join(GPUS)}; high, low or both")
    if endpoint not in SENDERS:
        raise ConfigError(f"--endpoint {endpoint}: must be {' or '.join(SENDERS)}")
    path = resolve_model(model) if model else ensure_default_model()
    kind = GPUS[gpu]
    kind = replace(
        kind,
        memory_bytes=int(gpu_memory * 2**30) if gpu_memory else kind.memory_bytes,
        link_rate=link_rate * 1e9 if link_rate else kind.link_rate,
    )
    cluster = Cluster(nodes, gpus_per_node, kind.link_rate, network_rate * 1e9)
    workload = Workload(dataset_name, dataset_path, input_len, output_len, range_ratio)
    plan = Plan(
        load_model_spec(path),
        kind,
        cluster,
        workload,
        targets_ms,
        request_rate,
        measured=read_costs(costs) if costs else None,
        cached_share=prefix_hit_share,
        swap_bytes=int(swap_space * 2**30),
        affinity=affinity,
        endpoint=endpoint,
        jobs=jobs or os.cpu_count() or 1,
    )
    console = Console(width=130, highlight=False)
    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        choices = plan.choices(progress)
    if not choices:
        wanted = f"{request_rate:g} requests a second" if request_rate else "any rate"
        raise ConfigError(f"no placement on {cluster.num_gpus} GPUs keeps {describe(targets_ms)} at {wanted}")
    console.print(table_of(choices, targets_ms, time.monotonic() - started))
    for number, choice in enumerate(choices[: 1 + alternatives]):
        file = out if number == 0 else out.with_stem(f"{out.stem}-{number + 1}")
        heading = f"# {choice.name}: {choice.goodput:.2f} requests/s, judged by {choice.judged_by}\n"
        file.write_text(heading + yaml.safe_dump(choice.deployment, sort_keys=False), encoding="utf-8")
        console.print(f"{choice.name}: {file}", soft_wrap=True)


def table_of(choices: list[Choice], targets_ms: dict[str, float], seconds: float) -> Table:
    table = Table(title=f"{describe(targets_ms)}; planned in {seconds:.0f} s", title_justify="left")
    for heading in ("placement (prefill | decode)", "GPUs", "goodput", "per GPU", "judged by"):
        table.add_column(heading, justify="left" if heading.startswith("placement") else "right")
    for choice in choices[:10]:
        per_gpu = f"{choice.goodput / choice.num_gpus:.3f}/s"
        table.add_row(choice.name, str(choice.num_gpus), f"{choice.goodput:.2f}/s", per_gpu, choice.judged_by)
    return table


if __name__ == "__main__":
    run(main)
