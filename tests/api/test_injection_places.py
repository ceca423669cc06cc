"""What is sent is a value wherever it goes: never a path, a field of its own choice, an address."""

import socket
import threading
from collections.abc import Iterator
from typing import Final

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from backend.db_utils import session_scope
from backend.models import Base, Role, User
from main import create_app
from tests.api.sweeps import NOWHERE, Headers, Place, bodies, places, swept
from tests.conftest import PASSWORD, Service, SignIn

__all__ = ["swept"]

JANE: Final = "jane@example.com"
PATHS: Final = (
    "../../../../../../etc/passwd",
    "..\\..\\..\\windows\\win.ini",
    "/etc/passwd",
    "file:///etc/passwd",
    "....//....//etc/passwd",
    "%2e%2e%2fetc%2fpasswd",
    "holdfast.db",
    "jwt_secret_key",
)


def table_rows() -> dict[str, int]:
    with session_scope(read_only=True) as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


def roles() -> dict[int, Role]:
    with session_scope(read_only=True) as session:
        return {user.id: user.role for user in session.scalars(select(User))}


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """None of this is a matter of the engine."""
    return sqlite_service


def test_a_path_in_any_place_reaches_no_file(
    client: TestClient, service: Service, admin: Headers, swept: list[Place]
) -> None:
    before = set(service.folder.parent.rglob("*"))
    for place in swept:
        plain = place.send(client, "q" * 20, admin)
        for text in PATHS:
            answer = place.send(client, text, admin)
            # A slash within an id makes it another path, which there is not.
            expected = {plain.status_code} | ({404} if place.where == "path" else set())
            assert answer.status_code in expected, (place, text)
            assert "root:" not in answer.text, (place, text)
            assert "SQLite format" not in answer.text, (place, text)
    assert set(service.folder.parent.rglob("*")) == before


@pytest.mark.parametrize("label", PATHS[:2])
def test_a_label_names_no_file(
    client: TestClient, service: Service, admin: Headers, label: str
) -> None:
    before = set(service.folder.parent.rglob("*"))
    backup = client.post("/security/backup/create", json={"label": label}, headers=admin).json()
    assert (backup["label"], backup["status"]) == (label, "complete")
    made = {
        path.relative_to(service.folder) for path in {*service.folder.parent.rglob("*")} - before
    }
    assert {path.parts[0] for path in made} == {"backups", "backup.lock"}
    assert any(backup["id"] in path.name for path in made)


@pytest.mark.parametrize("path", PATHS)
def test_static_files_are_those_of_the_page_alone(client: TestClient, path: str) -> None:
    assert client.get("/static/docs.js").status_code == 200
    for spelt in (path, path.replace("/", "%2f"), path.replace(".", "%2e"), f"./{path}"):
        for prefix in ("/static/", "/static//", "/static/%2e%2e/", "/static/..%5c"):
            answer = client.get(prefix + spelt)
            assert answer.status_code == 404, spelt
            assert "root:" not in answer.text


EXTRA: Final = (
    {"role": "admin"},
    {"is_active": True},
    {"id": 1},
    {"user": {"role": "admin"}},
    {"actor_id": 1},
    {"created_at": "2020-01-01T00:00:00Z"},
    {"password_hash": "x"},
    {"__class__": "User"},
    {"__proto__": {"role": "admin"}},
    {"role[]": "admin"},
)


def test_a_field_that_is_not_described_is_refused_in_every_body(
    client: TestClient, service: Service, admin: Headers, sign_in: SignIn
) -> None:
    service.user(JANE)
    found = list(bodies(client.get("/openapi.json").json()))
    assert len(found) >= 11
    rows, people = table_rows(), roles()
    for method, pattern, example in found:
        path = pattern.replace("{user_id}", "2").replace("{backup_id}", NOWHERE)
        for extra in EXTRA:
            for headers in (admin, sign_in(JANE)):
                answer = client.request(method, path, json={**example, **extra}, headers=headers)
                assert answer.status_code in {403, 422}, (path, extra)
                assert headers is not admin or answer.status_code == 422, (path, extra)
    assert roles() == people
    rows_now = table_rows()
    # Refusals are on the record, and so are the sign-ins of this test.
    kept = rows.keys() - {"audit_events", "sign_ins"}
    assert {name: rows_now[name] for name in kept} == {name: rows[name] for name in kept}


def test_a_field_of_the_form_that_is_not_described_changes_nothing(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    form = {"username": JANE, "password": PASSWORD, "role": "admin", "is_admin": "1", "scope": "*"}
    token = client.post("/auth/token", data=form).json()["access_token"]
    me = client.get("/auth/me", headers={"Authorization": f"Bearer {token}"}).json()
    assert me["role"] == "user"
    assert roles()[2] is Role.USER


@pytest.fixture
def bait() -> Iterator[tuple[str, list[object]]]:
    """An address on loopback that nobody has a reason to call, and who did."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def wait() -> None:
            try:
                while True:
                    connection, caller = listener.accept()
                    calls.append(caller)
                    connection.close()
            except OSError:
                return

        thread = threading.Thread(target=wait)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/bait", calls
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_no_address_that_is_sent_is_called(
    client: TestClient, admin: Headers, swept: list[Place], bait: tuple[str, list[object]]
) -> None:
    url, calls = bait
    host = url.split("/")[2]
    spoofed = {
        "Host": host, "X-Forwarded-Host": host, "Forwarded": f"host={host}", "Origin": url,
        "Referer": url, "X-Original-URL": url, "X-Rewrite-URL": url, "Location": url,
    }  # fmt: skip
    for place in swept:
        assert place.send(client, url, admin | spoofed).status_code < 500, place
        place.send(client, f"s3://{host}/bucket", admin)
    assert calls == []
    # It would have been seen.
    with socket.create_connection(("127.0.0.1", int(host.split(":")[1])), 10) as caller:
        assert caller.recv(1) == b""
    assert len(calls) == 1


def test_no_request_takes_an_address_to_call() -> None:
    document = create_app().openapi()
    taken = [
        str(place)
        for place in places(document)
        if any(word in place.name for word in ("url", "uri", "host", "endpoint", "callback"))
    ]
    assert taken == []
