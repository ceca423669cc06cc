"""Callers who send, or take, what never ends: they get no hold on the service."""

import socket
import threading
import time
from contextlib import ExitStack

import pytest

from backend.api import connections
from backend.api.connections import BoundedConnection
from backend.api.strict_json import parse_json
from backend.errors import InvalidRequestError
from backend.settings import get_settings
from main import create_app
from tests.api.callers import SECONDS, Caller, is_problem, listening
from tests.conftest import ADMIN, Service, SignIn

CHUNKED = b"Host: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
WRONG = b"username=nobody%40example.com&password=wrong"
BODY = b'{"present_password": "x", "new_password": "seven grey herons at noon"}'


def test_a_text_that_does_not_end_is_refused_in_no_more_time_than_one_that_does() -> None:
    """Looking for its end at each of its quotes took nine seconds."""
    body = b"[" * 33 + b'"' + b'\\"' * 32_000
    # Of this thread alone, and far more than it takes: others on the core do not count.
    started = time.thread_time()
    with pytest.raises(InvalidRequestError):
        parse_json(body)
    assert time.thread_time() - started < 2


def test_what_comes_after_a_body_is_no_header(sqlite_service: Service, sign_in: SignIn) -> None:
    token = sign_in(ADMIN)["Authorization"].encode()
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    with listening(create_app()) as port:
        with Caller(port) as caller:
            caller.send(b"POST /auth/password HTTP/1.1\r\nAuthorization: ", token, b"\r\n", CHUNKED)
            caller.send(chunks, b"\r\n")
            assert caller.answer()[0] == 422
        with Caller(port) as caller:
            caller.send(b"POST /auth/password HTTP/1.1\r\n", CHUNKED, chunks)
            caller.send(b"Authorization: ", token, b"\r\n\r\n")
            assert caller.answer()[0] == 401


def test_who_takes_nothing_is_left(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)
    left, lost = threading.Event(), BoundedConnection.connection_lost

    def connection_lost(connection: BoundedConnection, exc: Exception | None) -> None:
        lost(connection, exc)
        left.set()

    monkeypatch.setattr(BoundedConnection, "connection_lost", connection_lost)
    times = 30
    with listening(create_app()) as port, socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        caller.settimeout(SECONDS)
        caller.connect(("127.0.0.1", port))
        asked = b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        caller.sendall(asked * times)
        assert left.wait(SECONDS)
        # What lies in the buffers may still be taken; the rest is not there.
        taken = 0
        try:
            while part := caller.recv(1 << 20):
                taken += len(part)
        except ConnectionResetError:
            pass
    assert taken < times * 1_000_000


def test_a_connection_whose_request_was_answered_early_is_not_kept_by_a_byte(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(create_app()) as port, Caller(port) as caller:
        caller.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert caller.answer()[0] == 404
        # Not before: the head has the time that it needs.
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
        caller.send(b"x")
        assert caller.is_closed


def test_who_waits_with_its_body_keeps_nobody_from_being_answered(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_CONCURRENT_REQUESTS", "4")
    get_settings.cache_clear()
    with listening(create_app()) as port, ExitStack() as stack:
        waiting = [stack.enter_context(Caller(port)) for _ in range(4)]
        for caller in waiting:
            caller.begin(len(WRONG))
        with Caller(port) as other:
            other.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            assert other.answer()[0] == 200
        # More than may be under way wait by now: the one that has for longest is left.
        with Caller(port) as last:
            last.begin(len(WRONG))
            assert is_problem(waiting[0].answer(), 408, "request_timeout")
            assert waiting[0].is_closed
            for caller in (last, waiting[1]):
                caller.send(WRONG)
                assert caller.answer()[0] == 401
