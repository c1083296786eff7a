"""A Ray cluster of this machine alone, for a server whose deployment wants one and that is told of none (RAY_ADDRESS).

Whoever may speak to a Ray cluster may run any code in it: here that is who has the run's token.
"""

import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.config import Deployment
from tools.server.ports import free_ports

OBJECT_STORE_BYTES = 80 << 20  # nothing is put there; Ray takes no less


@dataclass(frozen=True, slots=True)
class LocalRay:
    """Its ports stay the same however often it is started."""

    ports: list[int] = field(default_factory=lambda: free_ports(3))
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def environment(self) -> dict[str, str]:
        """Of its own processes, and of those that join it."""
        return {"RAY_ADDRESS": f"127.0.0.1:{self.ports[0]}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def command(self, run_dir: Path, deployment: Deployment) -> list[str]:
        """Runs in the foreground, and leaves its files in the run directory."""
        num_ranks = len(deployment.prefill.devices) + len(deployment.decode.devices)
        options = {
            "node-ip-address": "127.0.0.1",
            "port": self.ports[0],
            "ray-client-server-port": self.ports[1],
            "dashboard-agent-listen-port": self.ports[2],
            "min-worker-port": 0,  # any
            "max-worker-port": 0,
            "num-cpus": max(os.cpu_count() or 1, num_ranks),
            "object-store-memory": OBJECT_STORE_BYTES,
            "temp-dir": run_dir / "ray",
            "include-dashboard": "false",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        return command + [f"--{name}={value}" for name, value in options.items()]
