"""Where failures are counted: a wrong setting stops the start, a silent server no one for long."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from backend.errors import ConfigurationError, TooManyAttemptsError, UnavailableError
from backend.services.auth_service import get_auth_service
from backend.services.setup_service import get_setup_service
from backend.services.throttle_service import get_throttle_service
from backend.settings import get_settings, load_settings
from main import create_app
from tests.conftest import PASSWORD, Run, Service, clear_caches
from tests.services.redis_server import redis_url

__all__ = ["redis_url"]

JANE: Final = "jane@example.com"
HOME, AWAY = "198.51.100.7", "203.0.113.9"
SIGN_IN: Final = {"username": JANE, "password": PASSWORD}
# Put into what is refused; it must not come back.
CANARY: Final = "kanarienvogel"
NEEDS_REDIS: Final = "redis is not installed: see requirements-parts.txt"
# Bounds what would hang for ever; the promise is two seconds for each question.
SECONDS: Final = 30


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Failures are not counted in the database."""
    sqlite_service.user(JANE)
    return sqlite_service


def count_in(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start again, counting in *store*."""
    monkeypatch.setenv("THROTTLE_STORE", store)
    clear_caches()
    get_setup_service().open()


def sign_in_and_readiness() -> tuple[Any, Any]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        return client.post("/auth/token", data=SIGN_IN), client.get("/readyz")


@pytest.mark.parametrize(
    "store", ["memcached://x", "redis://", "mongodb://x", "file:///tmp/x", "memory"]
)
def test_another_store_is_refused_at_the_start(store: str) -> None:
    with pytest.raises(ConfigurationError, match="THROTTLE_STORE"):
        load_settings(throttle_store=store)


@pytest.mark.parametrize(
    "store",
    [
        f"redis://[{CANARY}",
        f"redis://{CANARY}:99999/0",
        f"redis://{CANARY}:port",
        f"redis://127.0.0.1?db={CANARY}",
        f"redis://127.0.0.1?{CANARY}=1",
    ],
)
def test_an_address_of_no_server_stops_the_start_in_one_line_that_does_not_show_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, run: Run, store: str
) -> None:
    pytest.importorskip("redis", reason=NEEDS_REDIS)
    monkeypatch.setenv("THROTTLE_STORE", store)
    get_settings.cache_clear()
    answer = run("retention", "status")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert "THROTTLE_STORE" in line
    assert CANARY not in answer.out + answer.err


def test_what_is_wrong_with_the_setting_is_not_told_to_who_signs_in(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        monkeypatch.setenv("THROTTLE_STORE", f"redis://{CANARY}:99999/0")
        get_settings.cache_clear()
        answer = client.post("/auth/token", data=SIGN_IN)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert "THROTTLE_STORE" not in answer.text
    assert CANARY not in answer.text


def test_without_what_counts_nobody_is_let_in_and_readiness_says_so(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redis", reason=NEEDS_REDIS)
    count_in("redis://127.0.0.1:1", monkeypatch)
    with pytest.raises(UnavailableError):
        get_auth_service().sign_in(JANE, PASSWORD)
    answer, ready = sign_in_and_readiness()
    assert answer.status_code == 503
    assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
    assert ready.json()["checks"]["throttle"] == "does not answer"


@pytest.fixture
def silent_url() -> Iterator[str]:
    """The address of a server that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Whoever waits for ever is let go then.
        end = threading.Timer(2 * SECONDS, listener.close)
        end.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        end.cancel()


def test_a_server_that_says_nothing_is_not_waited_for_long(
    service: Service, monkeypatch: pytest.MonkeyPatch, silent_url: str
) -> None:
    pytest.importorskip("redis", reason=NEEDS_REDIS)
    count_in(silent_url, monkeypatch)
    begun = time.monotonic()
    answer, ready = sign_in_and_readiness()
    assert time.monotonic() - begun < SECONDS
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert ready.json()["checks"]["throttle"] == "does not answer"


def test_where_it_counts_people_are_let_in_and_it_is_ready(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in (redis_url, "memory://"):
        count_in(store, monkeypatch)
        answer, ready = sign_in_and_readiness()
        assert (answer.status_code, ready.status_code) == (200, 200), store
        assert "throttle" not in ready.json()["checks"]


def test_in_redis_all_processes_count_together_and_it_learns_no_address(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    throttle, site = get_throttle_service(), "2001:db8:7:1::1"
    for _ in range(2):
        # As another process would begin.
        count_in(redis_url, monkeypatch)
        for _ in range(5):
            throttle.failed(JANE, HOME)
            throttle.failed(JANE, site)
    for address in (HOME, site):
        with pytest.raises(TooManyAttemptsError):
            throttle.require_allowed(JANE, address)
    throttle.require_allowed(JANE, AWAY)
    throttle.succeeded(JANE, HOME)
    throttle.require_allowed(JANE, HOME)
    keys = list(redis.Redis.from_url(redis_url).scan_iter())
    assert keys
    told = (b"jane", HOME.encode(), b"2001:db8")
    assert [key for key in keys if any(word in key for word in told)] == []
