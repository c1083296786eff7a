"""What the fronts accept sends small pieces at once, and there may be many of it."""

import asyncio
import resource
import socket
import subprocess
import sys

import pytest

from ensemble.listener import MAX_FILES, listen


def test_accepted_connections_do_not_gather_small_pieces() -> None:
    async def is_at_once() -> bool:
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            found.set_result(bool(option))
            writer.close()

        listener = listen("127.0.0.1", 0, backlog=8)
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            answer = await asyncio.wait_for(found, 30)
            writer.close()
            await writer.wait_closed()
        return answer

    assert asyncio.run(is_at_once())


@pytest.mark.parametrize(("soft", "hard"), [(100, 300), (100, 100)])
def test_a_shells_limit_of_open_files_is_raised_for_what_is_started_too(soft: int, hard: int) -> None:
    program = """
import os
from ensemble.listener import raise_file_limit
print(raise_file_limit(), flush=True)
os.system("ulimit -n")
"""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    found = subprocess.run(
        [sys.executable, "-c", program], preexec_fn=lower, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == [str(min(hard, MAX_FILES))] * 2, found.stderr
