"""CORS: closed unless origins are listed, and then open to these alone, without credentials."""

from collections.abc import Iterator
from typing import Final

import pytest
from fastapi.testclient import TestClient

from backend.errors import ConfigurationError
from backend.settings import load_settings
from main import create_app
from tests.api.test_headers import lacking
from tests.conftest import ADMIN, PASSWORD, Service, clear_caches

OURS: Final = "https://app.example.com"
OTHERS: Final = (
    "https://elsewhere.example", "http://app.example.com", "https://app.example.com:8443",
    "https://app.example.com.elsewhere.example", "https://sub.app.example.com", "null", "*",
    "https://app.example.com, https://elsewhere.example", "HTTPS://APP.EXAMPLE.COM", "",
)  # fmt: skip
PATH: Final = "/security/data/export"


@pytest.fixture
def client(sqlite_service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The service with one origin allowed."""
    monkeypatch.setenv("CORS_ORIGINS", f"{OURS}, https://other.example.com:8443")
    clear_caches()
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def preflight(origin: str, method: str = "POST", header: str = "authorization") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": header,
    }


def test_a_page_of_a_listed_origin_may_ask_and_read(client: TestClient) -> None:
    asked = client.options(PATH, headers=preflight(OURS, header="authorization, content-type"))
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == OURS
    form = {"username": ADMIN, "password": PASSWORD}
    answer = client.post("/auth/token", data=form, headers={"Origin": OURS})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == OURS
    # A cache must not hand one origin's answer to another.
    assert "Origin" in answer.headers["vary"]


def test_a_page_may_read_why_it_was_refused(client: TestClient) -> None:
    answer = client.get("/auth/me", headers={"Origin": OURS})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == OURS


def test_a_page_may_read_why_it_was_not_even_let_in(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_ENV", "production")
    clear_caches()
    answer = TestClient(create_app()).get("/auth/me", headers={"Origin": OURS})
    assert (answer.status_code, answer.json()["code"]) == (403, "https_required")
    assert answer.headers["access-control-allow-origin"] == OURS
    assert lacking(answer.headers, path="/auth/me") == ["/auth/me: no CORS"]


@pytest.mark.parametrize("origin", OTHERS)
def test_no_other_origin_is_let_in(client: TestClient, origin: str) -> None:
    for answer in (
        client.options(PATH, headers=preflight(origin)),
        client.get("/auth/me", headers={"Origin": origin}),
    ):
        assert answer.status_code >= 400
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "header"), [("PATCH", "authorization"), ("TRACE", "authorization"), ("GET", "x-a")]
)
def test_a_listed_origin_is_let_do_no_more_than_the_service_has(
    client: TestClient, method: str, header: str
) -> None:
    answer = client.options(PATH, headers=preflight(OURS, method, header))
    assert answer.status_code == 400


def test_no_cookie_or_stored_password_is_asked_for(client: TestClient) -> None:
    for answer in (
        client.options(PATH, headers=preflight(OURS)),
        client.get("/healthz", headers={"Origin": OURS, "Cookie": "session=1"}),
    ):
        assert answer.headers["access-control-allow-origin"] == OURS
        assert "access-control-allow-credentials" not in answer.headers


def test_what_is_answered_before_any_route_is_has_the_safe_headers_too(client: TestClient) -> None:
    for origin in (OURS, OTHERS[0]):
        headers = client.options(PATH, headers=preflight(origin)).headers
        # It looks at no header of CORS: those are the point here.
        assert lacking(headers, path=PATH) in ([], [f"{PATH}: no CORS"])


# The setting


@pytest.mark.parametrize(
    "origin",
    [
        "*", "null", "app.example.com", "https://", "https://*.example.com", "ftp://app.example.com",
        "https://app.example.com/", "https://app.example.com/page", "https://app.example.com:443",
        "https://user@app.example.com", "https://App.example.com", "https://app.example.com?a",
        "https://app.example.com,*", "http://app.example.com", "http://localhost.example.com",
        "http://10.0.0.1",
    ],
)  # fmt: skip
def test_what_is_no_exact_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="CORS_ORIGINS: exact origins"):
        load_settings(cors_origins=origin)


def test_exact_origins_are_taken_and_plain_ones_of_this_machine_in_development_only() -> None:
    listed = f" {OURS} ,https://[2001:db8::1]:8443, https://127.0.0.1,"
    settings = load_settings(cors_origins=listed, app_env="production")
    assert settings.allowed_origins == (OURS, "https://[2001:db8::1]:8443", "https://127.0.0.1")
    assert load_settings().allowed_origins == ()
    for origin in ("http://localhost:5173", "http://127.0.0.1", "http://[::1]:3000"):
        assert load_settings(cors_origins=origin).allowed_origins == (origin,)
        with pytest.raises(ConfigurationError, match="CORS_ORIGINS"):
            load_settings(cors_origins=origin, app_env="production")
