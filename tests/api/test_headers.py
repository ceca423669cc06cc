"""Headers: what every answer carries, errors included, and what none does."""

import re
from collections.abc import Mapping
from typing import Final

import pytest
from fastapi.testclient import TestClient

from backend.services.encryption_service import EncryptionService
from main import create_app
from tests.conftest import Service

Headers = dict[str, str]
ORIGIN: Final = {"Origin": "https://elsewhere.example"}
NOWHERE: Final = "11111111-2222-4333-8444-555555555555"
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}


def every_path(client: TestClient) -> list[tuple[str, str]]:
    """Each operation of the OpenAPI document, the pages, and paths that do not exist."""
    document = client.get("/openapi.json").json()
    found = [
        (method.upper(), re.sub(r"\{user_id\}", "7", path).replace("{hold_id}", NOWHERE))
        for path, operations in document["paths"].items()
        for method in operations
    ]
    found = [(method, path.replace("{backup_id}", NOWHERE)) for method, path in found]
    found += [("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/static/docs.js")]
    return [*found, ("GET", "/nowhere"), ("GET", "/static/nowhere.js"), ("PATCH", "/auth/me")]


def lacking(given: Mapping[str, str], *, path: str) -> list[str]:
    """Safe headers that are not there."""
    policy = given.get("content-security-policy", "")
    wanted = {
        "nosniff": given.get("x-content-type-options") == "nosniff",
        "frames": given.get("x-frame-options") == "DENY" and "frame-ancestors 'none'" in policy,
        "policy": policy.startswith("default-src 'none'") and "unsafe" not in policy,
        "referrer": given.get("referrer-policy") == "no-referrer",
        "request id": re.fullmatch("[0-9a-f]{16}", given.get("x-request-id", "")) is not None,
        "no-store": given.get("cache-control") == "no-store" or path.startswith("/static/"),
        "no CORS": not any(name.startswith("access-control-") for name in given),
        "no server name": "server" not in given,
    }
    return [f"{path}: {name}" for name, there in wanted.items() if not there]


def test_every_answer_carries_them_with_a_token_and_without(
    client: TestClient, admin: Headers
) -> None:
    found: list[str] = []
    statuses: set[int] = set()
    # Signing out comes last.
    paths = sorted(every_path(client), key=lambda route: route[1].startswith("/auth/logout"))
    for token in ({}, admin):
        for method, path in paths:
            answer = client.request(method, path, headers=token | ORIGIN)
            statuses.add(answer.status_code)
            found += lacking(answer.headers, path=path)
    assert found == []
    assert statuses >= {200, 201, 204, 401, 404, 405, 422}


def test_an_unforeseen_failure_carries_them_too(
    client: TestClient, admin: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_service: EncryptionService) -> str:
        raise RuntimeError

    monkeypatch.setattr(EncryptionService, "generate_key", fail)
    path = "/security/encryption/key/generate"
    answer = client.get(path, headers=admin)
    assert answer.status_code == 500
    assert lacking(answer.headers, path=path) == []


def test_a_body_that_is_too_long_is_answered_with_them_too(client: TestClient) -> None:
    answer = client.post("/auth/token", content=b"x" * (16 * 1024 * 1024 + 1), headers=FORM)
    assert answer.status_code == 413
    assert lacking(answer.headers, path="/auth/token") == []


def test_each_request_has_an_id_of_its_own_and_does_not_choose_it(client: TestClient) -> None:
    asked = {"X-Request-ID": "chosen"}
    ids = {client.get("/healthz", headers=asked).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    assert "chosen" not in ids


def test_no_other_origin_is_let_in(client: TestClient) -> None:
    preflight = ORIGIN | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = client.options("/security/data/export", headers=preflight)
    assert answer.status_code == 405
    assert lacking(answer.headers, path="/security/data/export") == []


def test_https_alone_asks_for_https_from_then_on(sqlite_service: Service) -> None:
    for scheme, wanted in (("http", False), ("https", True)):
        with TestClient(create_app(), base_url=f"{scheme}://testserver") as client:
            headers = client.get("/healthz").headers
        assert ("strict-transport-security" in headers) is wanted


def test_the_page_runs_its_own_scripts_and_no_inline_ones(client: TestClient) -> None:
    policy = client.get("/docs").headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "http" not in policy
    static = client.get("/static/docs.js")
    assert static.headers["cache-control"] == "max-age=3600"
