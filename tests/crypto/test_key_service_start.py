"""A start while the key service is down: answered with 503, and ready once it is back."""

import pytest
from fastapi.testclient import TestClient

import main
from backend.services.setup_service import get_setup_service
from tests.conftest import KEY, Service, clear_caches
from tests.crypto.conftest import needs

WRAPPED = "vault:v1:" + "A" * 80


def restart(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", key)
    clear_caches()


def test_until_the_key_service_answers_requests_are_told_to_come_back(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("hvac")
    assert sqlite_service.folder.exists()
    # Nobody listens on port 1.
    for name, value in (("ADDR", "http://127.0.0.1:1"), ("TOKEN", "t"), ("TRANSIT_KEY", "k")):
        monkeypatch.setenv(f"VAULT_{name}", value)
    monkeypatch.setattr(get_setup_service(), "is_open", False)
    restart(monkeypatch, WRAPPED)
    with TestClient(main.create_app()) as client:
        waiting = client.get("/auth/me")
        assert (waiting.status_code, waiting.json()["code"]) == (503, "unavailable")
        assert int(waiting.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 200
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "does not answer" in ready.json()["checks"]["key"]
        # Nothing stands in for it: no key was made.
        assert not (sqlite_service.folder / "encryption.key").exists()
        restart(monkeypatch, KEY)
        assert main._opened()
        assert client.get("/auth/me").status_code == 401
        assert client.get("/readyz").status_code == 200
