"""Who may do what: every route of the service, as each kind of caller."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, Final
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import Base, InactivityNotice, Role, User
from backend.models.people import EMAIL_INDEX
from main import create_app
from tests.conftest import PASSWORD, Service, SignIn

JANE, JOE, GONE = "jane@example.com", "joe@example.com", "gone@example.com"


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Who may do what does not depend on the engine."""
    return sqlite_service


class Who(Enum):
    """The column "who" of the contract."""

    ANYONE = auto()  # Probes and the API page, too.
    SIGNED_IN = auto()
    SELF_OR_ADMIN = auto()
    ADMIN = auto()


@dataclass
class World:
    """What requests are made about."""

    person: int
    hold: str
    backup: str
    erasure: str
    notice: str


Arguments = Callable[[World], dict[str, Any]]
Route = tuple[str, str]


def _nothing(_world: World) -> dict[str, Any]:
    return {}


def _json(**fields: Any) -> Arguments:
    return lambda _world: {"json": fields}


def _person(**fields: Any) -> Arguments:
    return lambda world: {"json": {"user_id": world.person, **fields}}


# In this order they all succeed for an admin: what destroys comes last.
TABLE: Final[dict[Route, tuple[Who, Arguments]]] = {
    ("GET", "/healthz"): (Who.ANYONE, _nothing),
    ("GET", "/readyz"): (Who.ANYONE, _nothing),
    ("GET", "/metrics"): (Who.ANYONE, _nothing),
    ("GET", "/docs"): (Who.ANYONE, _nothing),
    ("GET", "/openapi.json"): (Who.ANYONE, _nothing),
    ("GET", "/static"): (Who.ANYONE, _nothing),
    ("POST", "/auth/token"): (
        Who.ANYONE,
        lambda _world: {"data": {"username": JANE, "password": PASSWORD}},
    ),
    ("GET", "/auth/me"): (Who.SIGNED_IN, _nothing),
    ("POST", "/security/data/export"): (Who.SELF_OR_ADMIN, _person(format="csv")),
    ("GET", "/security/data/consent/{user_id}"): (Who.SELF_OR_ADMIN, _nothing),
    ("POST", "/security/data/consent/{user_id}"): (
        Who.SELF_OR_ADMIN,
        _json(purpose="marketing", granted=True, evidence="signed form"),
    ),
    ("POST", "/security/data/find"): (Who.ADMIN, _person()),
    ("GET", "/security/data/erasures/{erasure_id}"): (Who.ADMIN, _nothing),
    ("GET", "/security/data/certificate-key"): (Who.ADMIN, _nothing),
    ("GET", "/security/data/export/schema"): (Who.SIGNED_IN, _nothing),
    ("GET", "/security/processing"): (Who.ADMIN, _nothing),
    ("GET", "/security/processing/page"): (Who.ADMIN, _nothing),
    ("GET", "/security/retention/policies"): (Who.ADMIN, _nothing),
    ("GET", "/security/retention/logs"): (Who.ADMIN, _nothing),
    ("GET", "/security/retention/policies/{data_type}/versions"): (Who.ADMIN, _nothing),
    ("GET", "/security/retention/forecast"): (Who.ADMIN, _nothing),
    ("GET", "/security/retention/notices"): (Who.ADMIN, _nothing),
    ("POST", "/security/retention/notices/{notice_id}/sent"): (Who.ADMIN, _nothing),
    ("GET", "/security/scheduler/status"): (Who.ADMIN, _nothing),
    ("GET", "/security/audit"): (Who.ADMIN, _nothing),
    ("GET", "/security/holds"): (Who.ADMIN, _nothing),
    ("GET", "/security/holds/{hold_id}"): (Who.ADMIN, _nothing),
    ("GET", "/security/backup/list"): (Who.ADMIN, _nothing),
    ("GET", "/security/backup/{backup_id}"): (Who.ADMIN, _nothing),
    ("GET", "/security/encryption/key/generate"): (Who.ADMIN, _nothing),
    ("GET", "/security/encryption/status"): (Who.ADMIN, _nothing),
    ("POST", "/security/retention/policy"): (
        Who.ADMIN,
        _json(data_type="feedback", retention_days=30, action="delete"),
    ),
    ("POST", "/security/retention/apply"): (Who.ADMIN, _json(dry_run=False)),
    ("POST", "/security/backup/create"): (Who.ADMIN, _json(label="second")),
    ("POST", "/security/backup/{backup_id}/verify"): (Who.ADMIN, _nothing),
    ("POST", "/security/backup/restore"): (
        Who.ADMIN,
        lambda world: {"json": {"backup_id": world.backup, "dry_run": True}},
    ),
    ("PUT", "/security/backup/{backup_id}/hold"): (Who.ADMIN, _json(until=None)),
    ("DELETE", "/security/backup/{backup_id}"): (Who.ADMIN, _nothing),
    # Not an export of ours, which is refused with 422 after the question who asks.
    ("POST", "/security/data/import"): (Who.ADMIN, _json(export={})),
    ("POST", "/security/holds"): (
        Who.ADMIN,
        _json(scope="data_type", data_type="invoice", reason="audit"),
    ),
    ("DELETE", "/security/holds/{hold_id}"): (Who.ADMIN, _nothing),
    ("POST", "/security/data/delete"): (
        Who.ADMIN,
        _person(mode="delete", reason="request under art. 17"),
    ),
    ("POST", "/auth/logout"): (Who.SIGNED_IN, _nothing),
}


def routes() -> Iterator[Route]:
    """Every route of the application, those outside its OpenAPI document too."""
    pending = list(create_app().routes)
    while pending:
        route: Any = pending.pop()
        if included := getattr(route, "original_router", None):
            pending += included.routes
            continue
        # A mount has no methods of its own.
        for method in getattr(route, "methods", None) or {"GET"}:
            if method != "HEAD":
                yield method, route.path


@pytest.fixture
def world(client: TestClient, service: Service, admin: dict[str, str]) -> World:
    person = service.user(JANE)
    service.user(JOE)
    gone = {"user_id": service.user(GONE), "mode": "delete", "reason": "request"}
    erased = client.post("/security/data/delete", json=gone, headers=admin).json()
    hold = client.post(
        "/security/holds",
        json={"scope": "data_type", "data_type": "payment", "reason": "claim"},
        headers=admin,
    ).json()["id"]
    # Two, and one of them proven, so that the other one may be deleted.
    proven = client.post("/security/backup/create", headers=admin).json()["id"]
    client.post(f"/security/backup/{proven}/verify", headers=admin)
    backup = client.post("/security/backup/create", headers=admin).json()["id"]
    now = datetime.now(UTC)
    notice = InactivityNotice(id=uuid4(), user_id=1, ends_at=now, queued_at=now)
    service.add(notice)
    return World(person, hold, backup, erased["erasure_id"], str(notice.id))


def ask(client: TestClient, route: Route, world: World, headers: dict[str, str]) -> int:
    """Make the table's request for *route* and return its status."""
    method, path = route
    arguments = TABLE[route][1](world)
    if path == "/static":
        path = "/static/docs.js"
    path = path.format(
        user_id=world.person, hold_id=world.hold, backup_id=world.backup,
        erasure_id=world.erasure, notice_id=world.notice, data_type="feedback",
    )  # fmt: skip
    return client.request(method, path, headers=headers, **arguments).status_code


def contents() -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with session_scope(read_only=True) as session:
        return {
            table.name: [
                tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))
            ]
            for table in Base.metadata.sorted_tables
        }


def allowed(*who: Who) -> list[Route]:
    return [route for route, (needed, _) in TABLE.items() if needed in who]


def test_every_route_has_an_entry_in_the_table(sqlite_service: Service) -> None:
    assert sorted(routes()) == sorted(TABLE)


def test_without_a_token_only_probes_page_and_sign_in_answer(
    client: TestClient, world: World
) -> None:
    denied = allowed(Who.SIGNED_IN, Who.SELF_OR_ADMIN, Who.ADMIN)
    before = contents()
    assert {route: ask(client, route, world, {}) for route in denied} == dict.fromkeys(denied, 401)
    assert contents() == before
    let_in = allowed(Who.ANYONE)
    assert {route: ask(client, route, world, {}) for route in let_in} == dict.fromkeys(let_in, 200)


def test_another_persons_data_and_an_admins_acts_are_denied(
    client: TestClient, world: World, sign_in: SignIn
) -> None:
    joe = sign_in(JOE)
    denied = allowed(Who.SELF_OR_ADMIN, Who.ADMIN)
    before = contents()
    assert {route: ask(client, route, world, joe) for route in denied} == dict.fromkeys(denied, 403)
    assert contents() == before
    for route in allowed(Who.ANYONE, Who.SIGNED_IN):
        assert ask(client, route, world, joe) < 300, route


def test_ones_own_data_is_open_and_an_admins_acts_are_denied(
    client: TestClient, world: World, sign_in: SignIn
) -> None:
    jane = sign_in(JANE)
    denied = allowed(Who.ADMIN)
    before = contents()
    assert {route: ask(client, route, world, jane) for route in denied} == dict.fromkeys(
        denied, 403
    )
    assert contents() == before
    for route in allowed(Who.ANYONE, Who.SELF_OR_ADMIN, Who.SIGNED_IN):
        assert ask(client, route, world, jane) < 300, route


def test_an_admin_may_do_everything(
    client: TestClient, world: World, admin: dict[str, str]
) -> None:
    for route in TABLE:
        wanted = {422} if route[1] == "/security/data/import" else {200, 201, 204}
        assert ask(client, route, world, admin) in wanted, route


def test_an_admin_records_anothers_consent_only_with_evidence(
    client: TestClient, world: World, admin: dict[str, str]
) -> None:
    path = f"/security/data/consent/{world.person}"
    body = {"purpose": "marketing", "granted": True}
    before = contents()
    assert client.post(path, json=body, headers=admin).status_code == 403
    assert contents() == before
    body["evidence"] = "signed form of 2026-11-20"
    assert client.post(path, json=body, headers=admin).status_code == 201


def test_a_denial_does_not_say_whether_the_person_exists(
    client: TestClient, world: World, sign_in: SignIn
) -> None:
    joe = sign_in(JOE)
    answers = [
        client.get(f"/security/data/consent/{user_id}", headers=joe)
        for user_id in (world.person, 999_999)
    ]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]


def test_a_person_who_becomes_an_admin_may_act_as_one_and_then_not(
    client: TestClient, world: World, sign_in: SignIn, service: Service
) -> None:
    joe = sign_in(JOE)
    path = "/security/encryption/status"
    assert client.get(path, headers=joe).status_code == 403
    for role, status in ((Role.ADMIN, 200), (Role.USER, 403)):
        with session_scope() as session:
            found = select(User).where(User.email_index == EMAIL_INDEX.term(JOE))
            session.scalars(found).one().role = role
        assert client.get(path, headers=joe).status_code == status
