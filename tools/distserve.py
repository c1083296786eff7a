"""The command `distserve`, which `pip install .` makes: the programs of this folder under one name.

distserve serve MODEL --prefill-devices cuda:0 --decode-devices cuda:1
distserve COMMAND --help
"""

import importlib
import sys
from importlib.metadata import version
from typing import NamedTuple

from tools.command_line import run

DISTRIBUTION = "distserve-triton"


class Command(NamedTuple):
    module: str  # imported only when the command is called: some bring torch
    attribute: str  # a function or an app, as `run` takes it
    summary: str


COMMANDS = {
    "serve": Command("tools.serve", "main", "serves a model until Ctrl-C"),
    "chat": Command("tools.client", "talk", "talks to a running server"),
    "client": Command("tools.client", "main", "streams the continuation of a prompt from a running server"),
    "bench": Command("tools.bench_serving", "main", "puts load on a running server, and says what its clients see"),
    "fleet": Command("tools.fleet", "app", "lists, adds, drains and removes a running server's replicas"),
    "demo": Command("tools.demo", "main", "one answer from a server of its own, and where its time went"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"distserve {version(DISTRIBUTION)}")
    elif name in ("--help", "-h"):
        print("Usage: distserve COMMAND [OPTIONS]\n")
        for each, command in COMMANDS.items():
            print(f"  {each:8}{command.summary}")
        print("\n`distserve COMMAND --help` tells a command's options, `distserve --version` the version.")
    elif name in COMMANDS:
        command = COMMANDS[name]
        sys.argv[:2] = [f"distserve {name}"]
        run(getattr(importlib.import_module(command.module), command.attribute))
    else:
        print(f"error: no command {name!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
