"""Connections are given up when what begins a request is endless, late, or no HTTP."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread
from starlette.types import Receive, Scope, Send

from backend.api import connections
from backend.api.connections import MAX_HEAD_BYTES
from main import create_app
from tests.api.callers import CANARY, SECONDS, Caller, is_problem, listening, port_of
from tests.conftest import Service
from tests.test_main import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base: Path = tmp_path_factory.mktemp("connections")
    with serving(base / "data", log=base / "log") as running:
        yield running


@pytest.mark.parametrize(
    ("start", "unit", "code"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: ", CANARY.encode(), 431),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X-%s: a\r\n" % CANARY.encode(), 431),
        (b"GET /", CANARY.encode(), 431),
        (b"GET /healthz?", CANARY.encode(), 431),
        (CANARY.encode(), b"", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n", b"\r\n",
         400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n",
         b"\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n", b"\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX-A: a\r\n", b"\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n", b"\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\nHost: x\r\nHost: y\r\n", b"\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\nHost: x\r\n", b"\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization: a\r\nAuthorization: b\r\n",
         b"\r\n", 400),
        (b"POST /auth/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n",
         b"\r\n", 400),
        (b"POST /auth/token HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n", b"\r\n",
         400),
    ],
)  # fmt: skip
def test_a_head_that_is_endless_or_no_http_is_refused(
    server: Server, start: bytes, unit: bytes, code: int
) -> None:
    with Caller(port_of(server)) as caller:
        caller.send(start)
        # Little more than the bound, so that nothing is left unread when the answer comes.
        left = MAX_HEAD_BYTES + 4096 - len(start) if code == 431 else len(unit)
        caller.send((unit * (left // max(len(unit), 1) + 1))[:left])
        codes = {431: "request_header_fields_too_large", 400: "bad_request"}
        assert is_problem(caller.answer(), code, codes[code])
        assert caller.is_closed
    with Caller(port_of(server)) as caller:
        caller.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: ", b"a" * 16_000, b"\r\n\r\n")
        assert caller.answer()[0] == 200


def test_a_head_that_does_not_arrive_is_given_up(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(create_app()) as port, Caller(port) as kept:
        for byte in whole:
            kept.send(bytes([byte]))
        assert kept.answer()[0] == 200
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
        kept.send(whole[:20])
        assert is_problem(kept.answer(), 408, "request_timeout")
        assert kept.is_closed
        with Caller(port) as silent:
            assert is_problem(silent.answer(), 408, "request_timeout")
            assert silent.is_closed


def test_a_late_head_does_not_get_into_the_answer_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    go_on.set()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        length = [(b"content-length", b"2"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await to_thread.run_sync(go_on.wait, SECONDS)
        await send({"type": "http.response.body", "body": b"2"})

    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(app) as port, Caller(port) as caller:
        caller.send(whole)
        assert caller.answer()[2] == 12
        go_on.clear()
        caller.send(whole)
        assert caller.head().startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
        caller.send(whole[:20])
        # Cut, and nothing else.
        assert caller.rest() == b"1"
        go_on.set()


def test_what_is_refused_unread_is_logged_and_counted_and_as_safe_as_any_answer(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log") as server:
        with Caller(port_of(server)) as caller:
            caller.send(b"GET / HTTP/1.1\r\n\r\n")
            status, headers, body = caller.answer()
        with Caller(port_of(server)) as caller:
            caller.send(b"GET /metrics HTTP/1.0\r\n\r\n")
            counted = caller.rest().decode()
    assert status == 400
    for name in ("content-security-policy", "x-frame-options", "x-content-type-options"):
        assert headers[name]
    logged = (tmp_path / "log").read_text().splitlines()
    (told,) = [line for line in logged if body["request_id"] in line]
    assert "request_refused" in told
    assert 'holdfast_requests_total{method="unread",route="unmatched",status="400"}' in counted


@pytest.mark.parametrize("wanted", [b"h2c", b"websocket"])
def test_what_comes_behind_a_request_to_upgrade_is_not_lost_unseen(
    server: Server, wanted: bytes
) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    with Caller(port_of(server)) as caller:
        caller.send(whole, b"Connection: Upgrade\r\nUpgrade: ", wanted, b"\r\n\r\n", whole, b"\r\n")
        head = caller.head().decode().lower()
        assert head.startswith("http/1.1 200 ")
        # So the caller knows that the second one was not answered.
        assert "\r\nconnection: close\r\n" in head


def test_a_request_to_become_a_websocket_is_a_request(server: Server) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with Caller(port_of(server)) as caller:
        caller.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n", upgrade, b"\r\n")
        assert caller.answer()[0] == 200
