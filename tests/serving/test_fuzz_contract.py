"""A short run of the fuzzer; tools.proofs.fuzz_contract by itself sends 10,000."""

import pytest

from tools.proofs.fuzz_contract import fuzz
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server


def test_whatever_is_sent_is_answered(tiny_server: TritonServer) -> None:
    rows = {row["name"]: row for row in fuzz(tiny_server, num_requests=400, seed=1)}
    for name in ("requests with a fault of the server's", "processes ended", "blocks in use afterwards"):
        assert rows[name]["value"] == 0, name
    for name in ("HTTP 200", "HTTP 400", "gRPC answered", "gRPC refused"):
        assert rows[name]["value"] > 20, "the requests are too much alike"
