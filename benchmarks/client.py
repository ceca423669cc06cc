"""
A load client of plain sockets, in a process of its own: it must cost less than what it measures.

Reads one JSON object (`port`, `path`, `token`, `connections`, `seconds`) and writes another
(`requests`, `seconds`, `cpu_seconds`). Any answer but 200 ends it with an error.
"""

import json
import re
import selectors
import socket
import sys
import time
from typing import Final

_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
# A server that hangs must not hang the measurement.
_PATIENCE_SECONDS: Final = 10


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._received = b""

    def ask(self) -> None:
        self._received = b""
        self.socket.sendall(self._request)

    def is_answered(self) -> bool:
        """Read what has come; say whether it is a whole answer."""
        data = self.socket.recv(65536)
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            if not data:
                raise ConnectionError("the server closed the connection")
            return False
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(f"not 200: {head.splitlines()[0].decode()}")
        length = _LENGTH.search(head + b"\r\n")
        if length is None:
            raise ConnectionError("an answer without a length")
        return len(body) >= int(length[1])


def drive(port: int, request: bytes, *, connections: int, seconds: float) -> dict[str, float]:
    """Keep every connection busy for *seconds* and count whole answers."""
    answers = 0
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            connection = Connection(port, request)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.ask()
        cpu, started = time.process_time(), time.perf_counter()
        end = started + seconds
        while time.perf_counter() < end:
            ready = selector.select(_PATIENCE_SECONDS)
            if not ready:
                raise TimeoutError("the server does not answer")
            for key, _ in ready:
                if key.data.is_answered():
                    answers += 1
                    key.data.ask()
        spent = {
            "requests": answers,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
        }
        for key in list(selector.get_map().values()):
            key.data.socket.close()
    return spent


def main() -> None:
    order = json.load(sys.stdin)
    request = (
        f"GET {order['path']} HTTP/1.1\r\nHost: 127.0.0.1:{order['port']}\r\n"
        f"Authorization: Bearer {order['token']}\r\nAccept: application/json\r\n\r\n"
    ).encode()
    spent = drive(
        order["port"], request, connections=order["connections"], seconds=order["seconds"]
    )
    json.dump(spent, sys.stdout)


if __name__ == "__main__":
    main()
