"""What the fronts accept sends small pieces at once."""

import asyncio
import socket

from ensemble.listener import listen


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
