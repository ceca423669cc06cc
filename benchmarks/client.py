"""
A load client of plain sockets, in a process of its own: it must cost less than what it measures.

Reads one JSON object (`port`, `connections`, `seconds`, and `requests`: a list of `method`, `path`
and, where there is one, `token`, `json` or `form`; every connection goes round its share of them)
and writes another (`answers`, `failures`, `seconds`, `cpu_seconds`, `p50_ms`, `p99_ms`). Any answer
but a 2xx is a failure.
"""

import json
import math
import re
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any, Final
from urllib.parse import urlencode

_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: chunked\r\n", re.IGNORECASE)
_SUCCESS: Final = re.compile(rb"HTTP/1\.1 2\d\d ")
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
# A server that hangs must not hang the measurement.
_PATIENCE_SECONDS: Final = 30
# In production plain HTTP is answered only behind a proxy that ends TLS.
HEADERS: Final = {"Accept": "application/json", "X-Forwarded-Proto": "https"}
_BODIES: Final[dict[str, tuple[str, Callable[[Any], str]]]] = {
    "json": ("application/json", json.dumps),
    "form": ("application/x-www-form-urlencoded", urlencode),
}


def spelled(port: int, method: str, path: str, token: str = "", **body: Any) -> bytes:
    """Return the bytes of one request; *body* is `json` or `form`."""
    head = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    head += [f"{name}: {value}" for name, value in HEADERS.items()]
    if token:
        head.append(f"Authorization: Bearer {token}")
    payload = ""
    for kind, value in body.items():
        media_type, spell = _BODIES[kind]
        payload = spell(value)
        head += [f"Content-Type: {media_type}", f"Content-Length: {len(payload.encode())}"]
    return "\r\n".join([*head, "", payload]).encode()


class Latencies:
    """Counts per step of one per cent: a run of any length takes the same memory."""

    _STEP: Final = math.log(1.01)
    _LEAST_SECONDS: Final = 1e-6
    _STEPS: Final = 2_000

    def __init__(self) -> None:
        self._counts = [0] * self._STEPS

    def add(self, seconds: float) -> None:
        steps = int(math.log(max(seconds / self._LEAST_SECONDS, 1)) / self._STEP)
        self._counts[min(steps, self._STEPS - 1)] += 1

    def quantile_ms(self, share: float) -> float:
        """Return what *share* of all took at most, in milliseconds."""
        left = math.ceil(share * sum(self._counts))
        for step, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return math.exp((step + 1) * self._STEP) * self._LEAST_SECONDS * 1000
        raise ValueError("nothing was measured")


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int, requests: Iterable[bytes]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = cycle(requests)
        self._received = bytearray()
        self._asked_at = 0.0

    def ask(self) -> None:
        self._received.clear()
        self._asked_at = time.perf_counter()
        self.socket.sendall(next(self._requests))

    def is_answered(self) -> bool:
        """Read what has come; say whether it is a whole answer."""
        data = self.socket.recv(65536)
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if not data:
            raise ConnectionError("the server closed the connection")
        if end < 0:
            return False
        head = bytes(self._received[: end + 2])
        if _CHUNKED.search(head):
            return self._received.endswith(_LAST_CHUNK)
        length = _LENGTH.search(head)
        if length is None:
            raise ConnectionError("an answer without a length")
        return len(self._received) >= end + 4 + int(length[1])

    def is_success(self) -> bool:
        return _SUCCESS.match(self._received) is not None

    def waited_seconds(self) -> float:
        return time.perf_counter() - self._asked_at


def drive(
    port: int, requests: Sequence[bytes], *, connections: int, seconds: float
) -> dict[str, float]:
    """Keep every connection busy for *seconds*, wait for what is under way, count whole answers."""
    latencies, answers, failures = Latencies(), 0, 0
    open_ = [Connection(port, requests[at::connections]) for at in range(connections)]
    with selectors.DefaultSelector() as selector:
        cpu, started = time.process_time(), time.perf_counter()
        for connection in open_:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.ask()
        busy = connections
        while busy:
            ready = selector.select(_PATIENCE_SECONDS)
            if not ready:
                raise TimeoutError("the server does not answer")
            for key, _ in ready:
                connection = key.data
                if not connection.is_answered():
                    continue
                latencies.add(connection.waited_seconds())
                answers += 1
                failures += not connection.is_success()
                # Who waits longest would be left out if the end cut answers off.
                if time.perf_counter() < started + seconds:
                    connection.ask()
                else:
                    # The server may close it while others wait.
                    selector.unregister(connection.socket)
                    busy -= 1
        spent = time.perf_counter() - started
        cpu_spent = time.process_time() - cpu
    for connection in open_:
        connection.socket.close()
    return {
        "answers": answers,
        "failures": failures,
        "seconds": spent,
        "cpu_seconds": cpu_spent,
        "p50_ms": latencies.quantile_ms(0.5),
        "p99_ms": latencies.quantile_ms(0.99),
    }


def main() -> None:
    order = json.load(sys.stdin)
    requests = [spelled(order["port"], **request) for request in order["requests"]]
    spent = drive(
        order["port"], requests, connections=order["connections"], seconds=order["seconds"]
    )
    json.dump(spent, sys.stdout)


if __name__ == "__main__":
    main()
