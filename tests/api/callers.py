"""A caller who decides on every byte of a request, and a server to call."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Self
from urllib.parse import urlsplit

import pytest
import uvicorn

from backend.api.connections import BoundedConnection
from tests.test_main import Server

# Put into what is sent; it must not come back.
CANARY: Final = "Kanarienvogel"
# Bounds a server that hangs; how long a good one takes decides nothing.
SECONDS: Final = 60
FORM: Final = b"Content-Type: application/x-www-form-urlencoded\r\n"
Headers = dict[str, str]


class Caller:
    """A connection on which every byte is ours."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def send(self, *parts: bytes) -> None:
        self._socket.sendall(b"".join(parts))

    def begin(self, body_bytes: int, path: bytes = b"/auth/token") -> None:
        """Send a head and wait until its body is asked for: the request is under way."""
        length = b"Content-Length: %d\r\n" % body_bytes
        expect = b"Expect: 100-continue\r\n"
        self.send(b"POST ", path, b" HTTP/1.1\r\nHost: x\r\n", FORM, length, expect, b"\r\n")
        self.expect_continue()

    def expect_continue(self) -> None:
        assert self.head().startswith(b"HTTP/1.1 100 ")

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Read one answer: status, headers, JSON."""
        head = self.head().decode()
        headers = dict(re.findall(r"(?m)^([\w-]+): (.*?)\r$", head.lower()))
        body = b""
        while len(body) < int(headers["content-length"]):
            body += self._socket.recv(65536)
        return int(head.split(" ", 2)[1]), headers, json.loads(body)

    def head(self) -> bytes:
        return self._until(b"\r\n\r\n")

    def rest(self) -> bytes:
        """Read until the other side closes."""
        found = b""
        while part := self._socket.recv(65536):
            found += part
        return found

    @property
    def is_closed(self) -> bool:
        """Wait for the other side to close."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _until(self, mark: bytes) -> bytes:
        found = b""
        while not found.endswith(mark):
            found += self._socket.recv(1) or pytest.fail(f"closed after {found!r}")
        return found


def lines(headers: Headers) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def port_of(server: Server) -> int:
    port = urlsplit(server.url).port
    assert port is not None
    return port


def is_problem(answer: tuple[int, dict[str, str], Any], status: int, code: str) -> bool:
    found, headers, body = answer
    assert headers["content-type"] == "application/problem+json"
    assert (body["status"], body["request_id"]) == (found, headers["x-request-id"])
    assert headers["cache-control"] == "no-store"
    assert CANARY.lower() not in str(body).lower()
    return (found, body["code"]) == (status, code)


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """Serve *app* on a port of loopback, in this process, where bounds can be shortened."""
    config = uvicorn.Config(
        app, port=0, http=BoundedConnection, ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(SECONDS)
