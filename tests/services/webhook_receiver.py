"""A receiver of webhooks on loopback, which checks signatures as its operator would."""

import base64
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import orjson
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from backend.settings import get_settings

SECRET: Final = "whsec_" + base64.b64encode(b"kanarienvogel-and-more-bytes!").decode()
ELSEWHERE: Final = "/elsewhere"
# Part of the path, which many services make a secret of.
CANARY: Final = "wellensittich"
_PATIENCE_SECONDS: Final = 30


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    """What was received, and how it is answered: with a status, or (`None`) not at all."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answer: Callable[[Received], int | None] = lambda _received: 204
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def hang(self, _received: Received) -> None:
        """Answer only when the test is over."""
        self.released.wait(_PATIENCE_SECONDS)

    def wait(self) -> None:
        assert self.arrived.wait(_PATIENCE_SECONDS), "nothing was sent"


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Receive on a free port of loopback."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(self.path, headers, self.rfile.read(length))
            receiver.received.append(received)
            receiver.arrived.set()
            if (status := receiver.answer(received)) is not None:
                self.send_response(status)
                self.send_header("Location", receiver.url.partition("/hook")[0] + ELSEWHERE)
                self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_arguments: Any) -> None:
            """Those who hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        # The handshake belongs to the thread of the connection.
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    scheme = "http" if tls is None else "https"
    receiver.url = f"{scheme}://127.0.0.1:{server.server_port}/hook-{CANARY}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def set_webhook(monkeypatch: pytest.MonkeyPatch, url: str, secret: str = SECRET) -> None:
    """Have alerts told to *url*, which may be at home."""
    monkeypatch.setenv("ALERT_WEBHOOK_URL", url)
    monkeypatch.setenv("ALERT_WEBHOOK_SECRET", secret)
    monkeypatch.setenv("ALERT_WEBHOOK_ALLOW_PRIVATE", "true")
    get_settings.cache_clear()


def checked(received: Received, key: bytes, now: datetime | None = None) -> Any:
    """
    Return the content, if the headers are those of Standard Webhooks 1.0, section "Verifying".

    Raises:
        InvalidSignature: Another key, id, time or body.
    """
    sent = datetime.fromtimestamp(int(received.headers["webhook-timestamp"]), UTC)
    assert abs((now or datetime.now(UTC)) - sent) < timedelta(minutes=5), "too old or too new"
    version, _, signature = received.headers["webhook-signature"].partition(",")
    assert version == "v1"
    code = HMAC(key, SHA256())
    for part in (received.id, ".", received.headers["webhook-timestamp"], "."):
        code.update(part.encode())
    code.update(received.body)
    code.verify(base64.b64decode(signature, validate=True))
    return orjson.loads(received.body)


class Clock:
    """Stands for `datetime` in a module that only asks it for the time."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def now(self, _zone: object) -> datetime:
        return self.at

    def advance(self, **by: float) -> None:
        self.at += timedelta(**by)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(datetime.now(UTC))
    monkeypatch.setattr("backend.services.alert_service.datetime", clock)
    return clock


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as receiver:
        set_webhook(monkeypatch, receiver.url)
        yield receiver
