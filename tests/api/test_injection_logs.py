"""Logs cannot be forged: one event is one line, whatever is in the request."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import pytest

from tests.conftest import JWT_SECRET, KEY
from tests.test_main import Server, serving

# Whoever reads the log must not take this for an event.
FORGED: Final = "Kanarienvogel"
# Each would end a line, or be obeyed by a terminal, if it were written as it is.
SIGNS: Final = (
    f'\n{{"event": "{FORGED}", "level": "info"}}\n',
    f"\r\n2026-01-01T00:00:00.000000Z [info     ] {FORGED}\r\n",
    f"\x1b[2K\x1b[1A{FORGED}\x1b]0;{FORGED}\x07",
    f"\u2028{FORGED}\u2029\x85\x0b\x0c",
    f'", "event": "{FORGED}',
    f"%(message)s {{event}} {FORGED}",
    f"\u202e{FORGED}",
    f"{FORGED}" * 500,
)
_DEVELOPMENT: Final[dict[str, str]] = {}
_PRODUCTION: Final = {
    "APP_ENV": "production",
    "ENCRYPTION_KEY": KEY,
    "JWT_SECRET_KEY": JWT_SECRET,
    "TRUSTED_PROXIES": "127.0.0.1",
}
_EVENT: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[(info|warning|error) *\] \S.*")


def requests() -> Iterator[bytes]:
    """Every sign in every place that a caller controls."""
    for sign in SIGNS:
        spelt = quote(sign, safe="")
        # What is no line break may stand in a header as it is.
        raw = re.sub(rb"[\r\n\x0b\x0c]", b"\t", sign.encode())
        headers = b"".join(
            b"%s: %s\r\n" % (name, raw)
            for name in (
                b"User-Agent", b"Referer", b"Authorization", b"Cookie", b"X-Request-ID",
                b"X-Forwarded-For", b"Origin", b"Accept", FORGED.encode(),
            )
        )  # fmt: skip
        body = json.dumps({"user_id": sign, sign: sign}).encode()
        form = f"username={spelt}&password={spelt}&{spelt}={spelt}".encode()
        for path in (f"/{spelt}", f"/security/holds/{spelt}?{spelt}={spelt}", f"/static/{spelt}"):
            yield _request(b"GET", path, headers)
        yield _request(b"POST", "/security/data/find", b"Content-Type: application/json\r\n", body)
        yield _request(
            b"POST", "/auth/token", b"Content-Type: application/x-www-form-urlencoded\r\n", form
        )
        yield _request(b"POST", "/security/data/find", b"Content-Type: " + raw + b"\r\n", body)
        yield _request(FORGED.encode(), f"/{spelt}", b"")


def _request(method: bytes, path: str, headers: bytes, body: bytes = b"") -> bytes:
    head = b"%s %s HTTP/1.1\r\nHost: x\r\nX-Forwarded-Proto: https\r\nConnection: close\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    return head % (method, path.encode()) + headers + length + body


def ask(server: Server, request: bytes) -> bytes:
    address = urlsplit(server.url)
    answer = b""
    with socket.create_connection((address.hostname or "", address.port or 0), 60) as caller:
        caller.sendall(request)
        while part := caller.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize("settings", [_DEVELOPMENT, _PRODUCTION], ids=["development", "production"])
def test_one_event_stays_one_line(tmp_path: Path, settings: dict[str, str]) -> None:
    sent = 0
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        for request in requests():
            status = ask(server, request).split(b" ", 2)[1]
            assert status in {b"400", b"401", b"404", b"415", b"422", b"429", b"431"}, request
            sent += 1
        server.stop()
    text = (tmp_path / "log").read_bytes().decode()
    assert FORGED not in text
    assert not re.search(r"[^\n -~]", text)
    events = list(read(text, settings))
    # Refused before there is a request: what is no HTTP.
    assert sent / 2 < events.count("request") <= sent


def read(text: str, settings: dict[str, str]) -> Iterator[Any]:
    for line in text.removesuffix("\n").split("\n"):
        if settings is _PRODUCTION:
            yield json.loads(line)["event"]
        else:
            assert _EVENT.fullmatch(line), line
            yield line.split("] ", 1)[1].split()[0]
