"""What tests that start servers have in common."""

import socket
import time
from collections.abc import Callable

LIMIT = 900.0  # seconds, on a busy machine


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at, each another one."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def wait_for(what: str, found: Callable[[], bool], seconds: float = LIMIT) -> None:
    """Returns once it is so.

    Raises:
      TimeoutError: it was not so in time.
    """
    end = time.monotonic() + seconds
    while not found():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
