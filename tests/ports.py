"""Ports of loopback for servers of tests."""

import secrets
import socket
from contextlib import suppress
from typing import Final

# Below what the system gives to whoever connects or asks for any port: nobody gets one of these
# between our look and the start of a server.
_PORTS: Final = range(20_000, 32_000)


def free_port() -> int:
    while True:
        port = secrets.choice(_PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def free_ports(count: int) -> list[int]:
    """Return so many different ones."""
    found = set[int]()
    while len(found) < count:
        found.add(free_port())
    return list(found)
