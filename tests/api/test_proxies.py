"""Proxies that end TLS: who may say how a request came and from where, and HTTP in production."""

import http.client
import json
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

import main
from backend.settings import load_settings
from tests.api.test_headers import lacking
from tests.conftest import JWT_SECRET, KEY, Service
from tests.test_main import Server, fetch, serving

PRODUCTION: Final = {"APP_ENV": "production", "ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": JWT_SECRET}
PROBES: Final = ("/healthz", "/readyz", "/metrics")
HTTPS: Final = {"X-Forwarded-Proto": "https"}
CALLER: Final = "203.0.113.7"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer how and from where a request came, as the service sees it."""
    seen = {"from": scope["client"][0], "by": scope["scheme"]}
    await JSONResponse(seen)(scope, receive, send)


def seen(trusted: str, peer: str, headers: list[tuple[str, str]]) -> Any:
    """Send through what stands between the socket and the service."""
    config = main._server_config(load_settings(trusted_proxies=trusted))
    config.app = lambda: echo
    config.load()
    return TestClient(config.loaded_app, client=(peer, 1)).get("/", headers=headers).json()


# Whose word counts


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "found"),
    [
        # Behind a proxy, the caller is whom the proxy names last.
        ("127.0.0.1", "127.0.0.1", [CALLER], CALLER),
        ("10.1.0.0/16", "10.1.200.3", [CALLER], CALLER),
        ("10.0.0.1,10.0.0.2", "10.0.0.2", [f"{CALLER}, 10.0.0.1"], CALLER),
        ("fd00::/8", "fd12::1", ["2001:db8::7"], "2001:db8::7"),
        # On a socket of IPv6 an IPv4 proxy has such an address.
        ("10.1.0.0/16", "::ffff:10.1.200.3", [CALLER], CALLER),
        # What the caller itself sends stands before that, in the same line or another.
        ("127.0.0.1", "127.0.0.1", [f"198.51.100.1, {CALLER}"], CALLER),
        ("127.0.0.1", "127.0.0.1", ["198.51.100.1", CALLER], CALLER),
        ("127.0.0.1", "127.0.0.1", [f"127.0.0.1, {CALLER}"], CALLER),
        ("127.0.0.1", "127.0.0.1", [f"', 1=1 --, {CALLER}"], CALLER),
        # Who comes round the proxy is who they are.
        ("10.0.0.1", CALLER, ["198.51.100.1"], CALLER),
        ("10.0.0.1", "10.0.0.11", ["198.51.100.1"], "10.0.0.11"),
        ("10.1.0.0/16", "10.2.0.1", ["10.1.0.1"], "10.2.0.1"),
        ("10.1.0.0/16", "::ffff:10.2.0.1", ["10.1.0.1"], "::ffff:10.2.0.1"),
        # Without a proxy nobody is believed, on this machine neither.
        ("", "127.0.0.1", [CALLER], "127.0.0.1"),
        ("", "::1", [CALLER], "::1"),
    ],
)
def test_a_caller_cannot_choose_its_address(
    trusted: str, peer: str, forwarded: list[str], found: str
) -> None:
    headers = [("X-Forwarded-For", line) for line in forwarded]
    others = [("Forwarded", "for=192.0.2.1"), ("X-Real-IP", "192.0.2.2"), ("Via", "192.0.2.3")]
    assert seen(trusted, peer, headers + others)["from"] == found


@pytest.mark.parametrize(
    ("trusted", "peer", "said", "by"),
    [
        ("10.0.0.1", "10.0.0.1", "https", "https"),
        ("10.0.0.1", "10.0.0.1", "http", "http"),
        ("10.0.0.1", "10.0.0.1", "gopher", "http"),
        ("10.0.0.1", "10.0.0.2", "https", "http"),
        ("", "127.0.0.1", "https", "http"),
    ],
)
def test_only_a_proxy_says_that_a_request_came_over_https(
    trusted: str, peer: str, said: str, by: str
) -> None:
    headers = [("X-Forwarded-Proto", said), ("Forwarded", "proto=https"), ("X-Scheme", "https")]
    assert seen(trusted, peer, headers)["by"] == by


def test_settings_of_uvicorn_do_not_widen_whom_it_believes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    for trusted in ("", "10.0.0.1"):
        assert seen(trusted, CALLER, [("X-Forwarded-For", "192.0.2.1")])["from"] == CALLER


# HTTP in production


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in production behind a proxy on this machine."""
    base = tmp_path_factory.mktemp("proxies")
    settings = PRODUCTION | {"TRUSTED_PROXIES": "127.0.0.1"}
    with serving(base / "data", log=base / "log", **settings) as server:
        # The port is open before the service accepts.
        assert fetch(f"{server.url}/healthz") == 200
        yield server


def ask(server: Server, method: str, path: str, headers: dict[str, str]) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/auth/me"), ("POST", "/auth/token"), ("GET", "/docs"), ("GET", "/openapi.json"),
        ("GET", "/nowhere"), ("GET", "/healthz/"), ("GET", "//healthz"), ("GET", "/HEALTHZ"),
        ("GET", "/static/docs.js"), ("OPTIONS", "/auth/me"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("said", [{}, {"X-Forwarded-Proto": "http"}], ids=["no word", "http"])
def test_in_production_what_came_in_clear_is_refused(
    server: Server, method: str, path: str, said: dict[str, str]
) -> None:
    status, body, headers = ask(server, method, path, said)
    problem = json.loads(body)
    assert (status, problem["code"]) == (403, "https_required")
    assert headers["Content-Type"] == "application/problem+json"
    assert lacking(headers, path=path) == []
    # Over HTTP a browser must not take it, and a redirect would hide the mistake.
    assert headers["Strict-Transport-Security"] is None
    assert headers["Location"] is None
    assert ask(server, method, path, HTTPS)[0] != 403


@pytest.mark.parametrize("path", PROBES)
def test_probes_of_the_own_network_are_answered_over_http(server: Server, path: str) -> None:
    assert ask(server, "GET", path, {})[0] == 200


def test_over_the_proxy_answers_ask_for_https_from_then_on(server: Server) -> None:
    status, _, headers = ask(server, "GET", "/auth/me", HTTPS)
    assert status == 401
    assert headers["Strict-Transport-Security"] == "max-age=31536000"


def test_in_development_http_is_served(sqlite_service: Service) -> None:
    with TestClient(main.create_app()) as client:
        assert client.get("/auth/me").status_code == 401
