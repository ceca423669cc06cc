"""Input is bounded before it is read: in size, depth, time, and requests at once."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from anyio import to_thread
from starlette.types import Receive, Scope, Send

from backend.api import bodies
from backend.api.bodies import MAX_BODY_BYTES
from backend.api.middleware import AdmissionMiddleware, RequestMiddleware
from main import create_app
from tests.api.callers import FORM, SECONDS, Caller, Headers, is_problem, lines, listening, port_of
from tests.conftest import Service, SignIn
from tests.test_main import Server, serving

JANE: Final = "jane@example.com"
_SIGN_IN: Final = b"username=nobody&password=wrong"


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """What is refused before the database does not depend on the engine."""
    return sqlite_service


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Server]:
    limit = {"MAX_CONCURRENT_REQUESTS": "2"}
    with serving(base / "data", log=base / "log", **limit) as running:
        yield running


# Size


@pytest.mark.parametrize(
    "path", ["/security/data/find", "/auth/token", "/auth/logout", "/healthz", "/security/holds"]
)
def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_sent(
    server: Server, path: str
) -> None:
    method = b"GET" if path == "/healthz" else b"POST"
    for length in (b"%d" % (MAX_BODY_BYTES + 1), b"%d" % 10**18):
        with Caller(port_of(server)) as caller:
            head = (
                b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\nExpect: 100-continue\r\n\r\n"
            )
            caller.send(head % (method, path.encode(), length))
            assert is_problem(caller.answer(), 413, "content_too_large")


def test_a_large_body_is_asked_of_an_admin_alone(
    service: Service, admin: Headers, sign_in: SignIn
) -> None:
    service.user(JANE)
    body = b'{"export": {}, "user_id": %s1}' % (b" " * MAX_BODY_BYTES)
    head = (
        "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    refused: list[tuple[str, Headers, int, str]] = [
        ("/security/data/import", {}, 401, "unauthenticated"),
        ("/security/data/import", sign_in(JANE), 403, "forbidden"),
        ("/security/data/find", admin, 413, "content_too_large"),
    ]
    with listening(create_app()) as port:
        for path, headers, status, code in refused:
            with Caller(port) as caller:
                caller.send(head.format(path, lines(headers)).encode())
                assert is_problem(caller.answer(), status, code), path
        with Caller(port) as caller:
            caller.send(head.format("/security/data/import", lines(admin)).encode())
            caller.expect_continue()
            caller.send(body)
            status, _headers, problem = caller.answer()
            # Read whole, and found to be no export.
            assert (status, "export" in problem["detail"]) == (422, True)


# Time


def test_a_body_that_does_not_arrive_is_given_up(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(create_app()) as port:
        with Caller(port) as caller:
            caller.begin(len(_SIGN_IN))
            for byte in _SIGN_IN:
                caller.send(bytes([byte]))
            assert caller.answer()[0] == 401
        monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
        with Caller(port) as caller:
            caller.begin(100)
            assert is_problem(caller.answer(), 408, "request_timeout")
            assert caller.is_closed


def test_a_body_that_is_cut_short_is_no_failure_of_ours(server: Server, base: Path) -> None:
    for _ in range(3):
        with Caller(port_of(server)) as caller:
            caller.begin(100)
            caller.send(_SIGN_IN)
    assert _until_free(server) == 401
    log = (base / "log").read_text()
    assert log.count("status=422") >= 1
    assert "error" not in log


# Requests at once


def _sign_in(server: Server) -> tuple[int, dict[str, str], Any]:
    with Caller(port_of(server)) as caller:
        length = b"Content-Length: %d\r\n\r\n" % len(_SIGN_IN)
        caller.send(b"POST /auth/token HTTP/1.1\r\nHost: x\r\n", FORM, length, _SIGN_IN)
        return caller.answer()


def _until_free(server: Server) -> int:
    """Sign in, until there is room again, and say how that was answered."""
    deadline = time.monotonic() + SECONDS
    while (status := _sign_in(server)[0]) == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    return status


def test_more_requests_than_may_be_under_way_are_told_to_come_back() -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["path"] == "/docs":
            begun.release()
            await to_thread.run_sync(go_on.wait, SECONDS)
        length = [(b"content-length", b"1"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"1"})

    def ask(caller: Caller, path: bytes) -> None:
        caller.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)

    bounded = RequestMiddleware(AdmissionMiddleware(app, max_concurrent=2, https_only=False))
    with listening(bounded) as port, ExitStack() as stack:
        *callers, other = (stack.enter_context(Caller(port)) for _ in range(3))
        for caller in callers:
            ask(caller, b"/docs")
            assert begun.acquire(timeout=SECONDS)
        ask(other, b"/openapi.json")
        refused = other.answer()
        assert is_problem(refused, 503, "busy")
        assert int(refused[1]["retry-after"]) > 0
        for probe in (b"/healthz", b"/readyz"):
            ask(other, probe)
            assert other.answer()[0] == 200
        go_on.set()
        for caller in callers:
            assert caller.answer()[0] == 200
        ask(other, b"/openapi.json")
        assert other.answer()[0] == 200
